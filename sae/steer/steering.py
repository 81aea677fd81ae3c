"""`Steering`: a context in which a model runs with its stream changed, and counts where it was.

Which tokens are changed: a policy that gives the same answer with and without a KV cache.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from activations_cache import hooks
from activations_cache.prompts import Prompt, Prompts, prompts_of
from sae.steer.edits import Change, Edit, LatentEdits, Patch, Push, Rows, Splice

POLICIES = ("all", "prompt", "generated", "last", "class")
"""`last` is the prompt's last token; `class` is position 0, the class token of a ViT."""


@dataclass(frozen=True, kw_only=True)
class Patches:
    """The patches of a ViT, without class token and registers."""

    n_prefix: int
    """Positions before the first patch: `Reading.n_prefix` of a loaded vision model."""


Positions = str | Patches | Bool[Tensor, "_example _pos"]
"""One of POLICIES, the patches of a ViT, or a mask, which has a column for each token of the
prompts, padding included; nothing after the prompts is chosen by it."""


def check_positions(positions: Positions) -> None:
    """Check a policy before a model runs.

    Raises:
        ValueError: If it is not known.
    """
    if isinstance(positions, str) and positions not in POLICIES:
        raise ValueError(
            f"positions must be one of {', '.join(POLICIES)}, a mask or Patches, got {positions!r}"
        )


def chosen(
    policy: Positions,
    positions: Int[Tensor, "example pos"],
    prompt: Prompt | None,
    first_position: int,
) -> Bool[Tensor, "example pos"]:
    """Where a policy holds in one forward.

    Args:
        policy: The policy.
        positions: Absolute positions of the tokens, negative for padding.
        prompt: The prompts of these examples; None where the model reads no tokens.
        first_position: Positions below this one, the attention sinks, are never chosen, but by
            `class`.

    Raises:
        ValueError: If the policy needs a prompt and there is none, or a mask has another shape.
    """
    if isinstance(policy, Patches):
        return positions >= policy.n_prefix
    if isinstance(policy, str) and policy == "class":
        return positions == 0
    if prompt is None:
        if not isinstance(policy, str) or policy != "all":
            raise ValueError(
                f"positions must be all, class or Patches without a prompt, got {policy}"
            )
        return positions >= first_position
    n_tokens = prompt.n_tokens[:, None].to(positions.device)
    inside = positions < n_tokens
    return (positions >= first_position) & _of_prompt(policy, positions, prompt, inside)


def _of_prompt(
    policy: Positions,
    positions: Int[Tensor, "example pos"],
    prompt: Prompt,
    inside: Bool[Tensor, "example pos"],
) -> Bool[Tensor, "example pos"]:
    if isinstance(policy, Tensor):
        return inside & _masked(policy, positions, prompt)
    match policy:
        case "all":  # what follows a whole prompt is padding
            return inside if prompt.is_whole else torch.ones_like(inside)
        case "prompt":
            return inside
        case "generated":
            return torch.zeros_like(inside) if prompt.is_whole else ~inside
        case _:
            return positions == prompt.n_tokens[:, None].to(positions.device) - 1


def _masked(
    mask: Bool[Tensor, "_example _pos"], positions: Int[Tensor, "example pos"], prompt: Prompt
) -> Bool[Tensor, "example pos"]:
    n_examples, n_columns = mask.shape
    if len(positions) % n_examples:
        raise ValueError(
            f"a mask of positions must have a row for each of {len(positions)} examples, "
            f"got {n_examples}"
        )
    rows = mask.to(positions.device).repeat_interleave(len(positions) // n_examples, dim=0)
    columns = positions + prompt.n_padding[:, None].to(positions.device)
    within = (columns >= 0) & (columns < n_columns)
    return rows.gather(1, columns.clamp(0, n_columns - 1)) & within


_log = logging.getLogger(__name__)

Applied = LatentEdits | Splice | Patch | Push


@dataclass
class Count:
    """Proof that a change ran: on how many tokens, counted in each forward and for each beam."""

    name: str
    """What was changed, and where."""
    n_seen: int = 0
    """Tokens that passed the place."""
    n_chosen: int = 0
    """Those among them at which the positions hold: the change ran here."""
    n_changed: int = 0
    """Those among them whose stream became another."""
    relative_size: float = 0.0
    """Mean of |h' - h| / |h| over the tokens on which it ran."""

    def add(
        self,
        n_seen: int,
        h: Float[Tensor, "batch d_out"],
        new: Float[Tensor, "batch d_out"],
        is_changed: Bool[Tensor, " batch"],
    ) -> None:
        """Count one forward."""
        self.n_seen += n_seen
        n, before = len(h), self.n_chosen
        if n == 0:
            return
        norm = h.detach().float().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        size = float(((new - h).detach().float().norm(dim=1) / norm).mean())
        self.n_chosen += n
        self.n_changed += int(is_changed.sum())
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

    `counts` proves on how many tokens each change ran. A change that ran on none is logged in one
    line when the context ends.
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
            raise ValueError("changes must name at least one edit, got none")
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

    def __enter__(self) -> "Steering":
        """Attach the hooks."""
        with contextlib.ExitStack() as stack:
            for (place, applied), count in zip(self._applied, self.counts, strict=True):
                prompts = stack.enter_context(prompts_of(self.model, place[1]))
                work = _Work(applied, place, count, self, prompts)
                for point, fn in work.edits():
                    stack.enter_context(hooks.edit(self.model, {point: fn}))
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Remove the hooks, and say which changes never ran."""
        assert self._hooks is not None, "left without having been entered"
        self._hooks.close()
        for line in [] if kind is not None else self.unused():
            _log.warning(line)

    @property
    def n_tokens(self) -> int:
        """Tokens on which the first change ran; `counts` has them all."""
        return self.counts[0].n_chosen

    def unused(self) -> list[str]:
        """A line for each change that ran on no token."""
        policy = "mask" if isinstance(self.positions, Tensor) else repr(self.positions)
        return [
            f"{count.name} ran on none of {count.n_seen} tokens with positions {policy} from "
            f"{self.first_position} on; run the model in the context, or choose other positions"
            for count in self.counts
            if count.n_chosen == 0
        ]


Place = tuple[str, str]
"""Where a change reads and where it writes."""


def _place(change: Change) -> Place:
    match change:
        case Edit(dictionary=placed) | Splice(dictionary=placed):
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


class _Work:
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
        prompt = self._prompts.of(len(stream))
        where = chosen(self._steering.positions, positions, prompt, self._steering.first_position)
        x = stream if self._x is None else self._x
        self._x = None
        _require_widths(self._applied, self._place, x, stream)
        return apply_at(self._applied, where, x, stream, positions, self._count)


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
    changed = change(Rows(x.flatten(0, 1)[at], h, positions.reshape(-1)[at]))
    new = torch.where(changed.is_changed[:, None], changed.h.to(stream.dtype), h)
    if count is not None:
        count.add(len(flat), h, new, changed.is_changed)
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
    for point, made_for, found in widths:
        if made_for != found:
            raise ValueError(
                f"a change at {point} must be made for its width, {found} in this model, got one "
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
