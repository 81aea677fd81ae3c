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
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from activations_cache.hooks import blocks_of, capture
from activations_cache.isolation import Piece, Way, read_in_rows
from activations_cache.loading import one_line
from activations_cache.logits import (
    LogitsPath,
    Loss,
    find_logits_path,
    gain_of,
    loss_of,
    rows_of,
)
from activations_cache.reading import around, base_model, given_cache, reads_tokens, takes_tokens
from activations_cache.trial import (
    FAILURES,
    N_TOKENS,
    Passed,
    attempt,
    block_lists,
    errors,
    largest_error,
    passed_lists,
    run_whole,
    same_stream,
    tolerance_of,
    trial_inputs,
    trial_tokens,
    watching,
)
from monosema.checks import MonosemaError

N_FIRST = 7
"""Tokens of the first of two documents in a trial."""


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
    loss: Loss | None
    """What its logits of a text are scored on; None where they are of no tokens."""
    logits: LogitsPath | None
    """How the last stream becomes logits; None where that is not known."""

    @property
    def documents(self) -> Way | None:
        """How documents in one context are kept apart: the cheapest way that holds."""
        return next((way for way, leak in self.leaks.items() if leak <= self.tolerance), None)

    @property
    def predicts_next(self) -> bool:
        """Whether its logits are of the next token."""
        return self.loss == "next token"

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
            ("loss", f"of the {self.loss}" if self.loss else "none that is known"),
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


def require_next_token(model: nn.Module, what: str) -> None:
    """Refuse what is only true of a model whose logits are of the next token.

    Raises:
        ValueError: If they are not.
    """
    record = record_of(model)
    if not record.predicts_next:
        raise MonosemaError(
            f"model must predict the next token {what}, got {record.name}, whose attention is "
            f"{'causal' if record.is_causal else 'in both directions'}"
        )


def way_of(model: nn.Module, *, apart: bool) -> tuple[Way | None, bool]:
    """Return how documents in one context are kept apart, and whether the model is causal.

    Args:
        model: Asked only where documents shall be kept apart.
        apart: Whether they shall be.

    Raises:
        ValueError: If they shall be and cannot.
    """
    if not apart:
        return None, True
    record = record_of(model)
    if record.documents is None:
        leak = min(record.leaks.values())
        raise MonosemaError(
            f"text.attention must be context for {record.name}, got document: what a document's "
            f"tokens give there differs by {leak:.1g} from what they give alone"
        )
    return record.documents, record.is_causal


@torch.no_grad()
def _probe(model: nn.Module) -> ModelRecord:
    if not (takes_tokens(model) or takes_tokens(base_model(model))):
        raise MonosemaError(f"model must read tokens, got {type(model).__name__}")
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
    path, logits = find_logits_path(model, blocks, len(listed), ids)
    return ModelRecord(
        name=type(model).__name__,
        blocks=blocks,
        n_blocks=len(listed),
        other_blocks=_other_blocks(model, blocks),
        is_causal=is_causal,
        leaks=leaks,
        tolerance=tolerance,
        cache_argument=_cache_argument(model, ids, logits, 10 * tolerance),
        **layout._asdict(),
        loss=loss_of(model, ids, logits, is_causal=is_causal),
        logits=path,
    )


def _other_blocks(model: nn.Module, blocks: str) -> tuple[str, ...]:
    lists = {p: listed for p, listed in block_lists(model).items() if len(listed) > 1}
    lists = {p: b for p, b in lists.items() if isinstance(model.get_submodule(p), nn.ModuleList)}
    passed = passed_lists(model, lists) if len(lists) > 1 else [blocks]
    return tuple(path for path in lists if path not in {*passed, blocks})


class _Trial:
    """The last stream of a model, of documents alone and in one context."""

    def __init__(self, stream: Any, ids: Int[Tensor, "2 pos"], tolerance: float) -> None:
        self._stream, self._ids = stream, ids
        # Other shapes round otherwise, and in 16 bits that grows from block to block.
        self._rounding = 10 * tolerance
        self._alone: list[Float[Tensor, "pos _"]] = []

    def sees_later(self) -> float:
        """How much the first tokens change with those that follow them."""
        first, other = self._ids[:1], self._ids[:1].clone()
        other[:, N_FIRST:] = self._ids[1:, N_FIRST:]
        result = self._stream(torch.cat([first, other]))
        return largest_error(result[1, :N_FIRST], result[0, :N_FIRST])

    def leak_by_positions(self) -> float:
        """How much position ids that begin anew leave of the document before."""
        context = self._ids[:1]
        other = torch.cat([self._ids[1:, :N_FIRST], context[:, N_FIRST:]], dim=1)
        positions = torch.cat([torch.arange(N_FIRST), torch.arange(N_TOKENS - N_FIRST)])
        positions = positions.expand(2, -1).to(context.device)
        both = torch.cat([context, other])
        result = attempt(lambda: self._stream(both, position_ids=positions))
        if result is None:
            return torch.inf
        return max(largest_error(result[1, N_FIRST:], result[0, N_FIRST:]), self._change(result[0]))

    def leak_in_rows(self, *, with_mask: bool) -> float:
        """How much padding behind a document changes it."""
        pieces = [Piece(0, 0, N_FIRST), Piece(0, N_FIRST, N_TOKENS)]

        def run(ids: Tensor, **options: Any) -> dict[str, Tensor]:
            return {"": self._stream(ids, **options)}

        result = attempt(lambda: read_in_rows(run, self._ids, pieces, with_mask=with_mask)[""])
        return torch.inf if result is None else self._change(result[0])

    def _change(self, result: Float[Tensor, "pos _"]) -> float:
        """Of documents in a context from the same alone, if rounding does not explain it."""
        sizes = [N_FIRST, N_TOKENS - N_FIRST]
        if not self._alone:
            self._alone = [self._stream(ids)[0] for ids in self._ids[:1].split(sizes, dim=1)]
        pairs = zip(result.split(sizes), self._alone, strict=True)
        # The middle token of each: in 16 bits another expert may be chosen for a single one.
        change = max(float(errors(part, alone).median()) for part, alone in pairs)
        return 0.0 if change <= self._rounding else change


class StreamLayout(NamedTuple):
    """What runs to its end on what is read, and where the blocks' streams are in what it gives."""

    reader: str
    hidden_states: tuple[int | None, ...]
    first: int | None
    is_chained: bool


def layout_of(model: nn.Module) -> StreamLayout:
    """Return the layout of a model that need not read tokens.

    Of one that does not say what its images are nothing is known, and so no entry.

    Raises:
        ValueError: If it has no blocks, or does not run to its end.
    """
    blocks, listed = blocks_of(model)
    inputs = trial_inputs(model)
    if inputs is None:
        return StreamLayout("", (None,) * len(listed), None, True)
    return _layout(model, blocks, listed, inputs)


@torch.no_grad()
def _layout(
    model: nn.Module, path: str, blocks: list[nn.Module], ids: Shaped[Tensor, "example ..."]
) -> StreamLayout:
    """Try the backbone, then what is around the blocks, then the model; the most entries win.

    Raises:
        ValueError: If none of them passes the blocks and runs to its end.
    """
    paths = {module: name for name, module in model.named_modules()}
    inner = [m for m in around(model, f"{path}.0:out") if reads_tokens(m)]
    named = {f"{i}": block for i, block in enumerate(blocks)}
    results: list[StreamLayout] = []
    for module in dict.fromkeys([base_model(model), *inner[::-1], model]):
        with watching(named) as calls:
            output = attempt(lambda m=module: run_whole(m, ids, output_hidden_states=True))
            if output is None:
                output = attempt(lambda m=module: run_whole(m, ids))
        of_blocks = [calls[name][-1] for name in named if calls.get(name)]
        if output is not None and len(of_blocks) == len(named):
            streams = getattr(output, "hidden_states", None) or ()
            results.append(StreamLayout(paths[module], *_entries(of_blocks, streams)))
            # The last entry is often normed, so no other would have more.
            if None not in results[-1].hidden_states[:-1]:
                break
    if not results:
        raise MonosemaError(
            f"{type(model).__name__} must run on token ids alone, through {path or 'its blocks'}, "
            f"got {_failure(model, ids)}; load a model of the text alone"
        )
    return min(results, key=lambda layout: sum(i is None for i in layout.hidden_states))


def _failure(model: nn.Module, ids: Shaped[Tensor, "example ..."]) -> str:
    """Why a model does not run on tokens alone."""
    try:
        run_whole(base_model(model), ids)
    except FAILURES as error:
        return one_line(error)
    return "a forward that leaves them out"


def _entries(
    calls: list[Passed], streams: tuple[Tensor, ...]
) -> tuple[tuple[int | None, ...], int | None, bool]:
    """Which entries the blocks' outputs and the first input are, and whether blocks chain."""
    results: list[int | None] = []
    for call in calls:
        last = max((i for i in results if i is not None), default=-1)
        same = (i for i, s in enumerate(streams) if i > last and same_stream(s, call.out))
        results.append(next(same, None))
    first = next((i for i, s in enumerate(streams) if same_stream(s, calls[0].first)), None)
    is_chained = all(same_stream(a.out, b.first) for a, b in pairwise(calls))
    return tuple(results), first, is_chained


def _cache_argument(
    model: nn.Module, ids: Int[Tensor, "example pos"], whole: Tensor | None, tolerance: float
) -> str | None:
    """The argument by which two tokens, one by one, continue a cache as if all were read."""
    n = N_TOKENS - 2

    def steps() -> tuple[str | None, list[Tensor]]:
        output, name, result = model(input_ids=ids[:, :n], use_cache=True), None, []
        for at in range(n, N_TOKENS):
            cache = given_cache(model, output)
            name = next(iter(cache), None)
            if name is None:
                break
            output = model(input_ids=ids[:, at : at + 1], use_cache=True, **cache)
            result.append(output.logits[:, -1])
        return name, result

    name, result = (attempt(steps) or (None, [])) if whole is not None else (None, [])
    if name is None or whole is None:
        return None
    return name if largest_error(torch.stack(result, dim=1), whole[:, n:]) <= tolerance else None


def readout(model: nn.Module) -> Float[Tensor, "vocab d_model"]:
    """Return what turns a direction in the last stream into logits, but for the norm's division.

    It is the output embedding times the weight of the norm before it and the scale behind it,
    without each row's mean where that norm takes it off; float32. A soft cap is left out, which
    changes no order.

    Raises:
        ValueError: If the model's own logits do not come about in this way.
    """
    path, record = logits_path(model), record_of(model)
    head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    with capture(model, [record.last]) as run:
        like = run(trial_tokens(model))[record.last][0]
    weight = rows_of(head, like) * path.scale
    if path.norm:
        norm: Any = model.get_submodule(path.norm)
        gain, _ = gain_of(norm, weight.shape[1], path.is_centred, like)
        weight = weight * gain.to(weight)
    return weight - weight.mean(dim=1, keepdim=True) if path.is_centred else weight


def logits_path(model: nn.Module) -> LogitsPath:
    """Return how the model's last stream becomes its logits.

    Raises:
        ValueError: If that is not known.
    """
    path = record_of(model).logits
    if path is None:
        raise MonosemaError(
            f"the logits of the model must be its head on the norm of its last stream, got others "
            f"from {type(model).__name__}; use what runs the model itself, such as attribute"
        )
    return path
