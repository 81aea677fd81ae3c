"""What is true of one model: seen in a few short forwards of it, and asked by every feature.

A habit of transformers is no contract: whether a token sees what follows it, what keeps documents
apart, which entry of `hidden_states` is which stream, whether a KV cache changes the logits and
how a stream becomes logits differ between families and releases.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from activations_cache.hooks import blocks_of, capture
from activations_cache.isolation import Piece, Way, read_in_rows
from activations_cache.reading import around, base_model, given_cache, reads_tokens, takes_tokens
from activations_cache.trial import (
    N_TOKENS,
    Passed,
    attempt,
    block_lists,
    run_whole,
    tolerance_of,
    trial_tokens,
    watching,
)

N_FIRST = 7
"""Tokens of the first of two documents in a trial."""


class LogitsPath(NamedTuple):
    """How the stream behind the last block becomes logits: cap(scale * head(norm(stream)))."""

    norm: str
    """Module path of the norm; empty where there is none."""
    is_centred: bool
    """Whether the norm takes off the mean of each row."""
    scale: float
    """What the head's result is multiplied by."""
    cap: float | None
    """The bound of a soft cap, cap(z) = bound * tanh(z / bound)."""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """What was seen of a model that reads tokens."""

    name: str
    """Its class."""
    blocks: str
    """Module path of the list of blocks that a text passes."""
    n_blocks: int
    """How many there are."""
    other_blocks: tuple[str, ...]
    """Lists that no text passes, such as those of a vision tower."""
    reader: str
    """Module path of what runs to its end on the text alone; empty for the model itself."""
    is_causal: bool
    """Whether no token sees what follows it."""
    is_chained: bool
    """Whether each block reads what the one before it gives."""
    leaks: Mapping[Way, float]
    """Relative error of a document's stream that shares a context, by the way of keeping it apart;
    infinite where the model cannot be called in that way."""
    tolerance: float
    """Relative error that rounding explains."""
    cache_argument: str | None
    """The argument by which a cached continuation gives the logits of an uncached one."""
    hidden_states: tuple[int | None, ...]
    """Which entry of `hidden_states` each block's output is; None for one that is no entry."""
    first: int | None
    """Which entry of `hidden_states` is the first block's input."""
    logits: LogitsPath | None
    """How the last stream becomes logits; None where that is not known."""

    @property
    def documents(self) -> Way | None:
        """How documents in one context are kept apart: the cheapest way that holds."""
        return next((way for way, leak in self.leaks.items() if leak <= self.tolerance), None)

    @property
    def predicts_next(self) -> bool:
        """Whether its logits are of the next token."""
        return self.is_causal and self.logits is not None

    @property
    def last(self) -> str:
        """The hook point behind the last block."""
        return f"{self.blocks}.{self.n_blocks - 1}:out"

    def lines(self) -> list[tuple[str, str]]:
        """What there is to be said, by subject, in few words."""
        documents = {
            "positions": "kept apart by position ids",
            "rows": "kept apart, each in a row of its own",
            None: "cannot be kept apart: attention: document is refused",
        }
        others = ", ".join(self.other_blocks)
        path = self.logits
        scale = "" if path is None or path.scale == 1 else f" times {path.scale:.4g}"
        cap = "" if path is None or path.cap is None else f", capped at {path.cap:.4g}"
        cached = f"equals the uncached one ({self.cache_argument})"
        return [
            ("blocks", f"{self.n_blocks} in {self.blocks}"),
            *([("no text passes", others)] if others else []),
            ("attention", "causal" if self.is_causal else "in both directions"),
            ("documents", documents[self.documents]),
            ("cached text", cached if self.cache_argument else "none that equals the uncached one"),
            ("logits", f"norm and head{scale}{cap}" if path else "not norm and head alone"),
        ]


_RECORDS: "WeakKeyDictionary[nn.Module, ModelRecord]" = WeakKeyDictionary()


def record_of(model: nn.Module) -> ModelRecord:
    """Return what is true of a model; the forwards run once for each model.

    Raises:
        ValueError: If the model reads no tokens, has no blocks, or cannot be run.
    """
    if model not in _RECORDS:
        _RECORDS[model] = _probe(model)
    return _RECORDS[model]


@torch.no_grad()
def _probe(model: nn.Module) -> ModelRecord:
    if not (takes_tokens(model) or takes_tokens(base_model(model))):
        raise ValueError(f"model must read tokens, got {type(model).__name__}")
    blocks, listed = blocks_of(model)
    ids, tolerance = trial_tokens(model), tolerance_of(model)
    point = f"{blocks}.{len(listed) - 1}:out"
    layout = _layout(model, blocks, listed, ids)
    with capture(model, [point]) as run:
        trial = _Trial(lambda some, **options: run(some, **options)[point], ids, tolerance)
        is_causal = trial.sees_later() <= tolerance
        leaks: dict[Way, float] = {
            "positions": trial.leak_by_positions(),
            "rows": trial.leak_in_rows(with_mask=not is_causal),
        }
    return ModelRecord(
        name=type(model).__name__,
        blocks=blocks,
        n_blocks=len(listed),
        other_blocks=tuple(p for p, b in block_lists(model).items() if len(b) > 1 and p != blocks),
        is_causal=is_causal,
        leaks=leaks,
        tolerance=tolerance,
        cache_argument=_cache_argument(model, ids, 10 * tolerance),
        **layout._asdict(),
        logits=_logits_path(model, blocks, len(listed), ids),
    )


class _Trial:
    """The last stream of a model, of documents alone and in one context."""

    def __init__(self, stream: Any, ids: Int[Tensor, "2 pos"], tolerance: float) -> None:
        self._stream, self._ids = stream, ids
        # Other shapes round otherwise, and in 16 bits that grows from block to block.
        self._rounding = 10 * tolerance

    def sees_later(self) -> float:
        """How much the first tokens change with those that follow them."""
        first, other = self._ids[:1], self._ids[:1].clone()
        other[:, N_FIRST:] = self._ids[1:, N_FIRST:]
        found = self._stream(torch.cat([first, other]))
        return _error(found[1, :N_FIRST], found[0, :N_FIRST])

    def leak_by_positions(self) -> float:
        """How much position ids that begin anew leave of the document before."""
        context = self._ids[:1]
        other = torch.cat([self._ids[1:, :N_FIRST], context[:, N_FIRST:]], dim=1)
        positions = torch.cat([torch.arange(N_FIRST), torch.arange(N_TOKENS - N_FIRST)])
        positions = positions.expand(2, -1).to(context.device)
        both = torch.cat([context, other])
        found = attempt(lambda: self._stream(both, position_ids=positions))
        if found is None:
            return torch.inf
        return max(_error(found[1, N_FIRST:], found[0, N_FIRST:]), self._change(found[0]))

    def leak_in_rows(self, *, with_mask: bool) -> float:
        """How much padding behind a document changes it."""
        pieces = [Piece(0, 0, N_FIRST), Piece(0, N_FIRST, N_TOKENS)]

        def run(ids: Tensor, **options: Any) -> dict[str, Tensor]:
            return {"": self._stream(ids, **options)}

        found = attempt(lambda: read_in_rows(run, self._ids, pieces, with_mask=with_mask)[""])
        return torch.inf if found is None else self._change(found[0])

    def _change(self, found: Float[Tensor, "pos _"]) -> float:
        """Of documents in a context from the same alone, if rounding does not explain it."""
        parts = self._ids[:1].split([N_FIRST, N_TOKENS - N_FIRST], dim=1)
        alone = torch.cat([self._stream(part)[0] for part in parts])
        change = _errors(found, alone).median()
        return 0.0 if change <= self._rounding else float(change)


def _errors(
    found: Float[Tensor, "*pos _"], expected: Float[Tensor, "*pos _"]
) -> Float[Tensor, "*pos"]:
    """The relative error of each row."""
    difference = (found.float() - expected.float()).norm(dim=-1)
    relative = difference / expected.float().norm(dim=-1).clamp_min(1e-30)
    return relative.nan_to_num(torch.inf)


def _error(found: Float[Tensor, "*pos _"], expected: Float[Tensor, "*pos _"]) -> float:
    """The largest relative error of a row."""
    return float(_errors(found, expected).max())


class _Layout(NamedTuple):
    """What runs to its end on the tokens, and where the blocks' streams are in what it gives."""

    reader: str
    hidden_states: tuple[int | None, ...]
    first: int | None
    is_chained: bool


def _layout(
    model: nn.Module, path: str, blocks: list[nn.Module], ids: Int[Tensor, "example pos"]
) -> _Layout:
    """Try the backbone, then what is around the blocks, then the model; the most entries win.

    Raises:
        ValueError: If none of them passes the blocks and runs to its end.
    """
    paths = {module: name for name, module in model.named_modules()}
    inner = [m for m in around(model, f"{path}.0:out") if reads_tokens(m)]
    named = {f"{i}": block for i, block in enumerate(blocks)}
    found: list[_Layout] = []
    for module in dict.fromkeys([base_model(model), *inner[::-1], model]):
        with watching(named) as calls:
            output = attempt(lambda m=module: run_whole(m, ids, output_hidden_states=True))
            if output is None:
                output = attempt(lambda m=module: run_whole(m, ids))
        of_blocks = [calls[name][-1] for name in named if calls.get(name)]
        if output is not None and len(of_blocks) == len(named):
            streams = getattr(output, "hidden_states", None) or ()
            found.append(_Layout(paths[module], *_entries(of_blocks, streams)))
    if not found:
        raise ValueError(
            f"{type(model).__name__} must run on token ids alone, got a model that does not pass "
            f"{path or 'its blocks'} to its end; load a model of the text alone"
        )
    return min(found, key=lambda layout: sum(i is None for i in layout.hidden_states))


def _entries(
    calls: list[Passed], streams: tuple[Tensor, ...]
) -> tuple[tuple[int | None, ...], int | None, bool]:
    """Which entries the blocks' outputs and the first input are, and whether blocks chain."""
    found: list[int | None] = []
    for call in calls:
        last = max((i for i in found if i is not None), default=-1)
        same = (i for i, s in enumerate(streams) if i > last and _equal(s, call.out))
        found.append(next(same, None))
    first = next((i for i, s in enumerate(streams) if _equal(s, calls[0].first)), None)
    is_chained = all(_equal(a.out, b.first) for a, b in pairwise(calls))
    return tuple(found), first, is_chained


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two streams are one, in the number format of the first."""
    both = a is not None and b is not None and a.shape == b.shape
    return both and torch.equal(a, b.to(a.dtype))


def _cache_argument(
    model: nn.Module, ids: Int[Tensor, "example pos"], tolerance: float
) -> str | None:
    """The argument by which two tokens, one by one, continue a cache as if all were read."""
    n = N_TOKENS - 2

    def steps() -> tuple[str | None, list[Tensor]]:
        output, name, found = model(input_ids=ids[:, :n], use_cache=True), None, []
        for at in range(n, N_TOKENS):
            cache = given_cache(model, output)
            name = next(iter(cache), None)
            if name is None:
                break
            output = model(input_ids=ids[:, at : at + 1], use_cache=True, **cache)
            found.append(output.logits[:, -1])
        return name, found

    expected = attempt(lambda: model(input_ids=ids, use_cache=False).logits[:, n:])
    name, found = attempt(steps) or (None, [])
    if name is None or expected is None:
        return None
    return name if _error(torch.stack(found, dim=1), expected) <= tolerance else None


def _logits_path(
    model: nn.Module, blocks: str, n_blocks: int, ids: Int[Tensor, "example pos"]
) -> LogitsPath | None:
    """Find the norm and the scale with which the model's own head gives the model's own logits."""
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else attempt(get)
    last = f"{blocks}.{n_blocks - 1}"
    outside = {name: m for name, m in model.named_modules() if not name.startswith(f"{blocks}.")}
    with watching({last: model.get_submodule(last), **outside}) as calls:
        output = attempt(lambda: run_whole(model, ids))
    logits = getattr(output, "logits", None)
    if head is None or not isinstance(logits, Tensor) or not calls.get(last):
        return None
    stream = calls[last][-1].out
    named = [n for n, c in calls.items() if n != last and c and _equal(c[0].first, stream)]
    for name in [*named, ""]:
        normed = calls[name][0].out if name else stream
        if normed is None or stream is None or normed.shape != stream.shape:
            continue
        given = attempt(lambda normed=normed: head(normed))
        fit = None if given is None else _fit(logits.double(), given.double(), tolerance_of(model))
        linear = _linear(model.get_submodule(name), stream) if name else False
        if fit is not None and linear is not None:
            return LogitsPath(name, linear, *fit)
    return None


def _fit(
    logits: Float[Tensor, "*pos vocab"], given: Float[Tensor, "*pos vocab"], tolerance: float
) -> tuple[float, float | None] | None:
    """The scale, and the bound of a soft cap, with which a head's result is the model's logits."""
    if logits.shape != given.shape or not float(given.norm()):
        return None
    y, z = logits.flatten(), given.flatten()
    scale = float((y @ z) / (z @ z))
    if float((y - scale * z).norm() / y.norm()) <= 10 * tolerance:
        return (1.0 if abs(scale - 1) < 10 * tolerance else scale), None
    top = z.abs().argmax()
    low, high = float(y.abs().max()), 1e4 * float(y.abs().max())
    for _ in range(60):
        middle = (low * high) ** 0.5
        below = middle * torch.tanh(z[top].abs() / middle) < y[top].abs()
        low, high = (middle, high) if below else (low, middle)
    capped = high * torch.tanh(z / high)
    return (1.0, high) if float((y - capped).norm() / y.norm()) <= 10 * tolerance else None


def _linear(norm: nn.Module, stream: Float[Tensor, "*pos d"]) -> bool | None:
    """Whether a norm takes off each row's mean; None if it is no norm with a weight and a bias."""
    rows = stream.flatten(0, -2)
    for is_centred in (False, True):
        gain, bias = gain_of(norm, rows.shape[1], is_centred, rows)
        expected = gain * divided(rows.float(), is_centred) + bias
        if _error(norm(rows), expected) <= (1e-3 if rows.dtype == torch.float32 else 3e-2):
            return is_centred
    return None


def gain_of(
    norm: nn.Module, width: int, is_centred: bool, like: Tensor
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """The weight and the bias with which a norm multiplies divided rows, seen at its output."""
    made = torch.randn(64, width, generator=torch.Generator().manual_seed(0)) * 100
    rows = made.to(like.device, like.dtype)
    with torch.no_grad():
        bias = norm(torch.zeros_like(rows[:1]))[0].float()
        u, out = divided(rows.float(), is_centred), norm(rows).float() - bias
    return (out * u).sum(dim=0) / u.square().sum(dim=0), bias


def divided(rows: Float[Tensor, "*pos d"], is_centred: bool) -> Float[Tensor, "*pos d"]:
    """Rows divided by their root mean square, without their mean first where that is taken off."""
    rows = rows - rows.mean(dim=-1, keepdim=True) if is_centred else rows
    return rows / rows.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-30)
