"""`Steering`: a context in which a model runs with its stream changed, and counts where it was."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from activations_cache import hooks
from activations_cache.probe import record_of
from activations_cache.prompts import Prompts, prompts_of
from activations_cache.reading import inner_model, takes_tokens
from activations_cache.trial import attempt
from monosema.checks import MonosemaError
from sae import notebook
from sae.steer.edits import (
    Calibrate,
    Change,
    Edit,
    EditedRows,
    LatentEdits,
    Patch,
    Push,
    Splice,
)
from sae.steer.generation import Positions, check_positions, chosen

_log = logging.getLogger(__name__)

Applied = LatentEdits | Calibrate | Splice | Patch | Push


@dataclass
class Count:
    """Proof that a change ran: on how many tokens, counted in each forward and for each beam."""

    name: str
    """What was changed, and where."""
    n_seen: int = 0
    """Tokens that passed the place."""
    n_chosen: int = 0
    """Those among them at which the positions hold: the change ran here."""
    n_meant: int = 0
    """Those among them for which the change gives another stream, before that is rounded."""
    n_changed: int = 0
    """Those among them whose stream became another."""
    relative_size: float = 0.0
    """Mean of |h' - h| / |h| over the tokens on which it ran."""

    def add(
        self,
        n_seen: int,
        h: Float[Tensor, "batch d_out"],
        new: Float[Tensor, "batch d_out"],
        is_meant: Bool[Tensor, " batch"],
    ) -> None:
        """Count one forward; what replaces the stream as a whole may give it back as it was."""
        self.n_seen += n_seen
        n, before = len(h), self.n_chosen
        if n == 0:
            return
        norm = h.detach().float().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        size = float(((new - h).detach().float().norm(dim=1) / norm).mean())
        self.n_chosen += n
        self.n_meant += int(is_meant.sum())
        self.n_changed += int((new != h).any(dim=1).sum())
        self.relative_size += (size - self.relative_size) * n / (before + n)


class Steering:
    """Change streams in every forward of a model inside this context, `generate` included.

    At each chosen token h' = h + sum_i (g_i(f_i) - f_i) d_i in float32, where f are the
    activations of h, d_i the directions and g_i the edits; the result is cast back to the model's
    dtype. So what a dictionary does not reconstruct is kept, and where nothing changes its latent
    the stream is kept to the bit. Consecutive edits of one dictionary see the same stream;
    otherwise changes apply in the order of the forward, at one place in the order given, each to
    the stream as the earlier ones have left it. With a KV cache and without, `generate`
    gives the same tokens.

    `counts` proves on how many tokens each change ran. When the context ends it is an error if the
    model never passed the place, or if rounding undid a change everywhere; a change whose positions
    chose no token is logged in one line. Logits that are not finite are an error as they come.
    In `output_hidden_states` the entry of the block that is changed is the stream as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        changes: Sequence[Change],
        *,
        positions: Positions = "all",
        first_position: int = 1,
    ) -> None:
        """Check the changes; nothing is hooked before the context begins.

        Args:
            model: The model, in evaluation mode.
            changes: What is done, and where.
            positions: On which tokens: all, prompt, generated, last (of the prompt), class, the
                `Patches` of a ViT, or a mask over the columns of the prompts.
            first_position: Positions below this one are left as they are. By default that is the
                first token, an attention sink.

        Raises:
            ValueError: If there are no changes, a latent is edited twice, or the positions are
                unknown.
        """
        if not changes:
            raise MonosemaError("changes must name at least one edit, got none")
        check_positions(positions)
        self.model = model
        self.positions: Positions = positions
        self.first_position = first_position
        self._applied = [(place, _joined(place, group)) for place, group in _grouped(changes)]
        self.counts = tuple(
            Count(" and ".join(map(str, a.edits)) if isinstance(a, LatentEdits) else str(a))
            for _, a in self._applied
        )
        self._hooks: contextlib.ExitStack | None = None
        self._is_tried = False
        self.refused: ValueError | None = None
        """The first error of a change in this context."""
        self.is_cache_wrong = False
        """Whether what continues a cache is another text, so that it is refused."""

    def __enter__(self) -> "Steering":
        """Attach the hooks.

        Raises:
            ValueError: If the model is compiled, so that hooks inside it would be left out.
        """
        inner = inner_model(self.model)
        reader = self.model if inner is None else inner
        if takes_tokens(reader) and not self._is_tried:
            # While nothing is changed: what is tried inside the context would be steered too.
            record = attempt(lambda: record_of(reader))
            self._is_tried = True
            # A bridge between two libraries may lose the cache of a model on its way.
            if inner is not None and record is not None and record.predicts_next:
                self.is_cache_wrong = record.cache_argument is None
        with contextlib.ExitStack() as stack:
            finite = self.model.register_forward_hook(self._require_finite)
            stack.callback(finite.remove)
            for (place, applied), count in zip(self._applied, self.counts, strict=True):
                prompts = stack.enter_context(prompts_of(self.model, place[1]))
                work = _ActiveChange(applied, place, count, self, prompts)
                for point, fn in work.edits():
                    stack.enter_context(hooks.edit(self.model, {point: fn}))
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Remove the hooks, and refuse what did not take place.

        Raises:
            ValueError: If the model never passed a place, or rounding undid a change everywhere.
        """
        assert self._hooks is not None, "left without having been entered"
        self._hooks.close()
        refused, self.refused = self.refused, None
        if kind is not None:
            return
        unused = [count for count in self.counts if not count.n_chosen]
        for count, line in zip(unused, self.unused(), strict=True):
            if count.n_seen == 0:
                # What runs the model may have kept an error to itself, as `generate_batch` does.
                raise refused or MonosemaError(line)
            _log.warning(line)  # a policy may choose none: the first tokens are all that there is
        for count in self.counts:
            if count.n_meant and not count.n_changed:
                raise MonosemaError(
                    f"{count.name} must change the stream, got the same at all {count.n_meant} "
                    "tokens that it is for; raise the strength, or run the model in float32, which "
                    "rounds less"
                )

    def _require_finite(self, _model: nn.Module, _args: tuple, output: object) -> None:
        """Refuse logits that no token can be chosen by; some models bar tokens by -inf."""
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if isinstance(logits, Tensor) and bool((logits.isnan() | logits.isposinf()).any()):
            raise MonosemaError(
                f"logits must be finite, got others in {type(self.model).__name__} under "
                f"{' and '.join(_with_strength(applied) for _, applied in self._applied)}; lower "
                f"the strength, or run the model in float32"
            )

    def _repr_html_(self) -> str:
        rows = [
            (
                c.name,
                *(f"{n:,}" for n in (c.n_seen, c.n_chosen, c.n_changed)),
                str(round(c.relative_size, 3)),
            )
            for c in self.counts
        ]
        columns = ("change", "tokens", "chosen", "changed", "mean |h' - h| / |h|")
        policy = "a mask" if isinstance(self.positions, Tensor) else str(self.positions)
        note = f"positions: {policy}, from {self.first_position} on"
        return notebook.table("Steering", columns, rows, note)

    @property
    def n_tokens(self) -> int:
        """Tokens on which the first change ran; `counts` has them all."""
        return self.counts[0].n_chosen

    def unused(self) -> list[str]:
        """A line for each change that ran on no token."""
        policy = "mask" if isinstance(self.positions, Tensor) else repr(self.positions)
        none, other = (
            "run the model in the context, and not compiled: torch.compile leaves hooks out",
            "choose other positions, or a lower first_position",
        )
        return [
            f"{count.name} ran on none of {count.n_seen} tokens with positions {policy} from "
            f"{self.first_position} on; {other if count.n_seen else none}"
            for count in self.counts
            if count.n_chosen == 0
        ]


Place = tuple[str, str]
"""Where a change reads and where it writes."""


def _place(change: Change) -> Place:
    match change:
        case Edit(dictionary=placed) | Calibrate(dictionary=placed) | Splice(dictionary=placed):
            return placed.hook_point, placed.config.hook_point_out
        case Patch(hook_point=point) | Push(hook_point=point):
            return point, point


def _grouped(changes: Sequence[Change]) -> Iterator[tuple[Place, list[Change]]]:
    """Consecutive edits of one dictionary together, everything else by itself."""

    def key(numbered: tuple[int, Change]) -> tuple[str, int]:
        number, change = numbered
        return ("edits", id(change.dictionary)) if isinstance(change, Edit) else ("", number)

    for _, group in groupby(enumerate(changes), key):
        of_group = [change for _, change in group]
        yield _place(of_group[0]), of_group


def _joined(place: Place, group: list[Change]) -> Applied:
    edits = [change for change in group if isinstance(change, Edit)]
    if edits:
        return LatentEdits(edits)
    (other,) = group
    assert not isinstance(other, Edit), place
    return other


class _ActiveChange:
    """One change at work in a model's forwards."""

    def __init__(
        self, applied: Applied, place: Place, count: Count, steering: Steering, prompts: Prompts
    ) -> None:
        self._applied, self._place, self._count = applied, place, count
        self._steering, self._prompts = steering, prompts
        self._x: Tensor | None = None

    def edits(self) -> list[tuple[str, hooks.Edit]]:
        """The functions of the stream, in the order in which a forward calls them."""
        reads, writes = self._place
        if reads == writes:
            return [(writes, self._change)]
        return [(reads, self._observe), (writes, self._change)]

    def _observe(
        self, stream: Float[Tensor, "example pos d_in"], _: Int[Tensor, "example pos"]
    ) -> Float[Tensor, "example pos d_in"]:
        self._x = stream
        return stream

    def _change(
        self, stream: Float[Tensor, "example pos d_out"], positions: Int[Tensor, "example pos"]
    ) -> Float[Tensor, "example pos d_out"]:
        try:
            return self._changed(stream, positions)
        except ValueError as error:
            self._steering.refused = self._steering.refused or error
            raise

    def _changed(
        self, stream: Float[Tensor, "example pos d_out"], positions: Int[Tensor, "example pos"]
    ) -> Float[Tensor, "example pos d_out"]:
        if self._steering.is_cache_wrong and self._prompts.continues:
            name = type(self._steering.model).__name__
            raise MonosemaError(
                f"{self._place[1]} must be read without a KV cache in {name}, which gives other "
                "logits with one; generate with use_past_kv_cache=False"
            )
        prompt = self._prompts.of(len(stream))
        where = chosen(self._steering.positions, positions, prompt, self._steering.first_position)
        x = stream if self._x is None else self._x
        self._x = None
        _require_widths(self._applied, self._place, x, stream)
        new = apply_at(self._applied, where, x, stream, positions, self._count)
        if not bool(new.isfinite().all()) and bool(stream.isfinite().all()):
            raise MonosemaError(
                f"the stream must stay finite in {str(new.dtype).removeprefix('torch.')} at "
                f"{self._place[1]}, got other numbers from {_with_strength(self._applied)}; lower "
                "the strength, or run the model in float32"
            )
        return new


def _with_strength(applied: Applied) -> str:
    """Name a change, and how strong it is."""
    match applied:
        case LatentEdits(edits=edits):
            units = " norms" if any(edit.in_norms for edit in edits) else ""
            return " and ".join(f"{edit} to {edit.value:g}{units}" for edit in edits)
        case Push(vector=vector):
            return f"{applied} with norm {float(vector.norm()):g}"
        case _:
            return str(applied)


def apply_at(
    change: Applied,
    where: Bool[Tensor, "example pos"],
    x: Float[Tensor, "example pos d_in"],
    stream: Float[Tensor, "example pos d_out"],
    positions: Int[Tensor, "example pos"],
    count: Count | None = None,
) -> Float[Tensor, "example pos d_out"]:
    """The stream, changed at some of its tokens and the same to the bit at the others."""
    at = where.flatten().nonzero().flatten()
    flat = stream.flatten(0, 1)
    h = flat[at]
    changed = change(EditedRows(x.flatten(0, 1)[at], h, positions.reshape(-1)[at]))
    new = torch.where(changed.is_changed[:, None], changed.h.to(stream.dtype), h)
    if count is not None:
        is_meant = changed.is_changed & isinstance(change, LatentEdits | Calibrate | Push)
        count.add(len(flat), h, new, is_meant)
    return flat.index_put((at,), new).view(stream.shape) if len(at) else stream


def _require_widths(applied: Applied, place: Place, x: Tensor, stream: Tensor) -> None:
    if isinstance(applied, Patch | Push):
        given = applied.rows if isinstance(applied, Patch) else applied.vector
        widths = [(place[1], given.shape[-1], stream.shape[-1])]
    else:
        placed = (
            applied.edits[0].dictionary if isinstance(applied, LatentEdits) else applied.dictionary
        )
        config = placed.config
        widths = [
            (place[0], config.d_in, x.shape[-1]), (place[1], config.width_out, stream.shape[-1])
        ]  # fmt: skip
    for point, made_for, result in widths:
        if made_for != result:
            raise MonosemaError(
                f"a change at {point} must be made for its width, {result} in this model, got one "
                f"for {made_for}; it belongs to another model or place"
            )


def per_example(edits: Sequence[Edit], *, first_position: int) -> hooks.Edit:
    """A function of the stream that changes example i by edit i alone, for trying many at once."""
    changes = [LatentEdits([edit]) for edit in edits]

    def fn(
        stream: Float[Tensor, "example pos d_model"], positions: Int[Tensor, "example pos"]
    ) -> Float[Tensor, "example pos d_model"]:
        pairs = zip(changes, stream.split(1), positions.split(1), strict=True)
        return torch.cat([apply_at(c, p >= first_position, h, h, p) for c, h, p in pairs])

    return fn
