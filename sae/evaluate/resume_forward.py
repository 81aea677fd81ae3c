"""Runs a model again from a hook point on, and compares the logits of two runs.

What comes before the hook point is not computed again. Logits are compared context by context.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor, nn

from activations_cache.config import parse_hook_point
from activations_cache.hooks import Edit, edit

Replacement = Callable[[Float[Tensor, "example pos d_model"]], Float[Tensor, "example pos d_model"]]
"""From the stream at the hook point to what shall flow on instead."""

_log = logging.getLogger(__name__)


class Base(NamedTuple):
    """What a model without a replacement gave."""

    stream: Float[Tensor, "example pos d_model"]
    """At the hook point, in the model's dtype."""
    logits: Float[Tensor, "example ..."]
    """What is read of the model, in its dtype."""


def logits_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """What is read of a causal language model."""
    return model(input_ids=input_ids, use_cache=False).logits


def logits_of_padded(model: nn.Module, input_ids: Tensor) -> Tensor:
    """What is read of a masked model, which may not see the padding, -1."""
    return model(input_ids=input_ids.clamp_min(0), attention_mask=(input_ids >= 0).long()).logits


class Replay:
    """One model and one hook point: `base` runs all of it, `spliced` the rest with another stream.

    `base` keeps what the blocks before the hook point returned, and `spliced` lets them return
    that again instead of computing it. Whether this gives the same logits is tried once; a model
    for which it does not (blocks that run twice, say) is run in full each time.
    """

    def __init__(
        self,
        model: nn.Module,
        hook_point: str,
        *more: str,
        read: Callable[[nn.Module, Tensor], Tensor] = logits_of,
    ) -> None:
        """Take a model in evaluation mode; nothing is changed in it between the calls.

        `more` are hook points at which `spliced` may replace the stream too; `read` runs the model
        on what it reads and returns what is wanted of it.
        """
        self._read = read
        self._model = model
        self._hook_point = hook_point
        before = [_blocks_before(model, point) for point in (hook_point, *more)]
        self._blocks = min(before, key=len)
        self._returned: dict[nn.Module, object] = {}
        self._tried = not self._blocks

    @torch.no_grad()
    def base(self, input_ids: Shaped[Tensor, "example ..."]) -> Base:
        """Run the whole model and remember what the following calls of `spliced` need."""
        if not self._tried:
            self._try(input_ids[:1])
        return self._base(input_ids)

    @torch.no_grad()
    def follow(self, deeper: "Replay", input_ids: Shaped[Tensor, "example ..."]) -> None:
        """Take what the last `base` of another replay kept, in place of one of our own.

        Args:
            deeper: Of the same model, whose hook point lies no earlier than ours.
            input_ids: What its `base` was given.
        """
        if not self._tried:
            self._try(input_ids[:1])
        kept = deeper._returned
        self._returned = {block: kept[block] for block in self._blocks if block in kept}

    @property
    def depth(self) -> int:
        """The number of blocks that need not run again."""
        return len(self._blocks)

    @torch.no_grad()
    def spliced(
        self,
        input_ids: Shaped[Tensor, "example ..."],
        replacement: Replacement,
        more: Mapping[str, Replacement] | None = None,
    ) -> Float[Tensor, "example ..."]:
        """Logits with `replacement(stream)` in place of the stream.

        Args:
            input_ids: The same as in the last call of `base`.
            replacement: What flows on instead.
            more: The same at further hook points.
        """
        each = {self._hook_point: replacement, **(more or {})}
        edits = {point: _edit(fn) for point, fn in each.items()}
        with _returning(self._returned), edit(self._model, edits):
            return self._logits(input_ids)

    def _base(self, input_ids: Tensor) -> Base:
        seen: list[Tensor] = []
        calls: dict[nn.Module, list[object]] = {block: [] for block in self._blocks}
        late: set[nn.Module] = set()

        def keep(block: nn.Module, _args: tuple, output: object) -> None:
            calls[block].append(output)
            if seen:
                late.add(block)

        def observe(stream: Tensor, _: Tensor) -> Tensor:
            seen.append(stream.clone())
            return stream

        with contextlib.ExitStack() as hooks:
            # Before the edit's own hook, so that the last block's output is kept unedited.
            for block in self._blocks:
                hooks.callback(block.register_forward_hook(keep).remove)
            hooks.enter_context(edit(self._model, {self._hook_point: observe}))
            logits = self._logits(input_ids)
        once = (b for b, outputs in calls.items() if len(outputs) == 1 and b not in late)
        self._returned = {block: calls[block][0] for block in once}
        return Base(seen[0], logits)

    def _try(self, input_ids: Tensor) -> None:
        self._tried = True
        expected = self._base(input_ids)
        if torch.equal(self.spliced(input_ids, lambda _: expected.stream), expected.logits):
            return
        _log.warning("%s cannot be run from %s on; it is run in full", *self._names())
        self._blocks = []
        self._returned = {}

    def _names(self) -> tuple[str, str]:
        return type(self._model).__name__, self._hook_point

    def _logits(self, input_ids: Tensor) -> Tensor:
        return self._read(self._model, input_ids)


def _edit(replacement: Replacement) -> Edit:
    return lambda stream, _: replacement(stream)


def _blocks_before(model: nn.Module, hook_point: str) -> list[nn.Module]:
    """The entries of the list of blocks around a hook point that are done when it is passed."""
    path, side = parse_hook_point(hook_point)
    parts = path.split(".")
    for depth in range(1, len(parts)):
        blocks = model.get_submodule(".".join(parts[:depth]))
        if isinstance(blocks, nn.ModuleList):
            is_same_end = depth == len(parts) - 1 and side == "out"
            return list(blocks)[: int(parts[depth]) + is_same_end]
    return []


@contextlib.contextmanager
def _returning(outputs: dict[nn.Module, object]) -> Iterator[None]:
    """Let modules return what they are given here instead of computing it."""
    before = {module: vars(module).get("forward") for module in outputs}
    try:
        for module, output in outputs.items():
            module.forward = lambda *_, output=output, **__: output
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


LOGITS_AT_ONCE = 1 << 20
"""float32 log-probabilities made at once: larger blocks fall out of a CPU's cache."""


class LogitTally(NamedTuple):
    """Sums over the scored tokens of each context."""

    n_tokens: Float64[Tensor, " example"]
    ce_base: Float64[Tensor, " example"]
    ce: Float64[Tensor, " example"]
    kl: Float64[Tensor, " example"]
    same: Float64[Tensor, " example"]

    @classmethod
    def joined(cls, parts: list["LogitTally"]) -> "LogitTally":
        """One tally of the contexts of several."""
        return cls(*(torch.cat(values) for values in zip(*parts, strict=True)))


def compare(
    base: Float[Tensor, "example pos vocab"],
    logits: Float[Tensor, "example pos vocab"],
    tokens: Int[Tensor, "example pos"],
    skip_positions: int,
    ahead: int = 1,
) -> LogitTally:
    """Sums over the predictions of each context that are made after the special positions.

    Args:
        base: Logits of the model as it is.
        logits: Logits with another stream.
        tokens: What is predicted; -1 is not scored.
        skip_positions: Predictions at this many first places are left out.
        ahead: How far behind its prediction a token stands; 0 for masked ones.
    """
    targets = tokens[:, skip_positions + ahead :]
    scored = targets >= 0
    example, place = scored.nonzero(as_tuple=True)
    figures = torch.zeros(len(example), 4, dtype=torch.float64, device=base.device)
    step = max(1, LOGITS_AT_ONCE // base.shape[-1])
    for start in range(0, len(example), step):
        part = slice(start, start + step)
        at = example[part], place[part] + skip_positions
        figures[part] = _figures(base[at], logits[at], targets[example[part], place[part]])
    n_tokens = scored.sum(dim=1).double()
    sums = torch.zeros(len(tokens), 4, dtype=torch.float64, device=base.device)
    sums.index_add_(0, example, figures)
    return LogitTally(n_tokens.cpu(), *sums.cpu().unbind(dim=1))


def _figures(
    base: Float[Tensor, "row vocab"],
    logits: Float[Tensor, "row vocab"],
    targets: Int[Tensor, " row"],
) -> Float64[Tensor, "row 4"]:
    """Cross-entropy of both, KL and agreement at each of some places."""
    log_p, log_q = (torch.log_softmax(each.float(), dim=1) for each in (base, logits))
    kl = (torch.softmax(base.float(), dim=1) * (log_p - log_q)).sum(dim=1)
    same = _likeliest(log_p) == _likeliest(log_q)
    ce_base, ce = (-log.gather(1, targets[:, None])[:, 0] for log in (log_p, log_q))
    return torch.stack([ce_base.double(), ce.double(), kl.double(), same.double()], dim=1)


def _likeliest(logits: Float[Tensor, "row vocab"]) -> Int[Tensor, " row"]:
    """The first of the largest; on a CPU numpy finds it in a sixth of the time."""
    if logits.device.type != "cpu":
        return logits.argmax(dim=1)
    return torch.from_numpy(logits.numpy().argmax(axis=1))
