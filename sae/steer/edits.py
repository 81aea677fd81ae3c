"""What can be done to a stream: edits of latents, splicing, patching, pushing along a vector.

Activations of a few latents of a stream, by their own rows where that is enough.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import NamedTuple, assert_never

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monosema.checks import MonosemaError
from sae import activations
from sae.activations import EncoderWeights
from sae.autoencoder import SparseAutoencoder
from sae.steer.config import Ablate, Add, Cap, Clamp, Floor, Operation, Scale, strength

Reader = Callable[[Float[Tensor, "batch d_in"]], Float[Tensor, "batch k"]]
"""From rows of the stream, in the model's units, to the activations of the latents asked for."""


def latent_reader(dictionary: SparseAutoencoder, latents: Int[Tensor, " k"]) -> Reader:
    """Return what reads the activations of a few latents, 0 where one does not fire.

    Where each latent is decided by itself (ReLU, JumpReLU, gated, and BatchTopK with its
    threshold) only their rows of the encoder are read: k d_in products per row of the stream in
    the place of d_sae d_in. Under TopK and in a refined read-out the others decide too, so all are
    encoded.

    Args:
        dictionary: The weights are taken as they are now.
        latents: Numbers; a latent may come more than once.
    """
    activation = dictionary.config.activation
    if activation.facts.choice in ("none", "batch") and dictionary.read_by == "linear":
        weights = _of_latents(dictionary.encoder(), latents)
        return lambda x: activations.encode_dense(activation, dictionary.scaled(x), weights)

    def picked(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch k"]:
        encoded = dictionary.encode(x)
        found = encoded.indices[:, :, None] == latents
        return (encoded.values[:, :, None] * found).sum(dim=1)

    return picked


def _of_latents(weights: EncoderWeights, latents: Int[Tensor, " k"]) -> EncoderWeights:
    """The encoder of some latents; constants, so gradients flow to the stream alone."""

    def part(tensor: Tensor) -> Tensor:
        return tensor.detach() if tensor.dim() == 0 else tensor.detach()[latents]

    magnitude, b_in = weights.magnitude, weights.b_in
    return EncoderWeights(
        enc_rows=part(weights.enc_rows),
        b_enc=part(weights.b_enc),
        b_in=None if b_in is None else b_in.detach(),
        threshold=None if weights.threshold is None else part(weights.threshold),
        magnitude=None if magnitude is None else type(magnitude)(*map(part, magnitude)),
        norms=None if weights.norms is None else part(weights.norms),
    )


def directions_of(
    dictionary: SparseAutoencoder, latents: Int[Tensor, " k"]
) -> Float[Tensor, "k d_out"]:
    """What an activation of 1 of each latent adds to the stream, in the model's units.

    With a norm of the input it is in units of what that norm divided the row by.
    """
    return dictionary.directions[latents]


@torch.no_grad()
def read_latents(
    dictionary: SparseAutoencoder, x: Float[Tensor, "batch d_in"], latents: Int[Tensor, " k"]
) -> Float[Tensor, "batch k"]:
    """Activations of a few latents, 0 where one does not fire."""
    return latent_reader(dictionary, latents)(x)


@dataclass(frozen=True, eq=False)
class Edit:
    """One latent, changed in one of six ways: h' = h + (g(f) - f) d, the error term kept.

    Strengths are numbers in the dictionary's own units, or texts such as "10x max" (times the
    latent's largest activation) and "0.5x norm" (what moves the stream by half of its norm).
    """

    dictionary: SparseAutoencoder
    """Whose latent it is."""
    _: KW_ONLY
    latent: int
    """Number of the latent."""
    clamp: float | int | str | None = None
    """g(f) = this."""
    add: float | int | str | None = None
    """g(f) = f + this."""
    scale: float | int | None = None
    """g(f) = this f."""
    ablate: bool = False
    """g(f) = 0."""
    cap: float | int | str | None = None
    """g(f) = min(f, this)."""
    floor: float | int | str | None = None
    """g(f) = max(f, this)."""
    only_firing: bool = False
    """Where the latent does not fire, leave it alone."""
    along: Float[Tensor, " d_out"] | None = None
    """A control arm: another direction, brought to the norm of the latent's own."""

    def __post_init__(self) -> None:
        """Check everything before a model runs."""
        self.dictionary.require_latent(self.latent)
        if self.along is not None and self.along.shape != self.dictionary.b_dec.shape:
            raise MonosemaError(
                f"along must be d_out={len(self.dictionary.b_dec)} wide, "
                f"got {tuple(self.along.shape)}"
            )
        _ = self.value  # refuses a unit that cannot be told

    @cached_property
    def operation(self) -> Operation:
        """The change as a config."""
        given = {name: getattr(self, name) for name in ("clamp", "add", "scale", "cap", "floor")}
        words = [name for name, value in given.items() if value is not None]
        words += ["ablate"] * self.ablate
        if len(words) != 1:
            raise MonosemaError(
                "an edit must have one of clamp, add, scale, ablate, cap and floor, "
                f"got {' and '.join(words) or 'none'}"
            )
        (word,) = words
        if word == "ablate":
            return Ablate(latent=self.latent)
        if word == "scale":
            return Scale(latent=self.latent, factor=given[word])
        value, unit = strength(word, given[word])
        kind = {"clamp": Clamp, "add": Add, "cap": Cap, "floor": Floor}[word]
        return kind(latent=self.latent, value=value, unit=unit, only_firing=self.only_firing)

    @cached_property
    def value(self) -> float:
        """The operation's number, in the dictionary's units or in units of the stream's norm."""
        match self.operation:
            case Scale(factor=factor):
                return float(factor)
            case Ablate():
                return 0.0
            case Clamp() | Add() | Cap() | Floor() as operation:
                size = _maximum(self.dictionary, self.latent) if operation.unit == "max" else 1.0
                return operation.value * size
            case _:
                assert_never(self.operation)

    @property
    def in_norms(self) -> bool:
        """Whether `value` counts norms of the stream."""
        return getattr(self.operation, "unit", "") == "norm"

    def __str__(self) -> str:
        """Name it in one line."""
        place = self.dictionary.config.hook_point_out
        return f"{self.operation.kind} of latent {self.latent} at {place}"


def _maximum(placed: SparseAutoencoder, latent: int) -> float:
    if placed.stats is None:
        option = "" if placed.read_by == "linear" else f" --read-out {placed.read_by}"
        raise MonosemaError(
            "stats must be given for a value in units of a latent's maximum, got None; "
            f"run `sae evaluate DICT --cache CACHE{option}`, then steer by the dictionary's path "
            "or name, or give a plain number"
        )
    maximum = float(placed.stats.max_activation[latent])
    if maximum == 0:
        raise MonosemaError(
            f"latent {latent} must have fired for a value in units of its maximum, got a latent "
            f"that was silent in {placed.stats.n_rows:,} rows; give a plain number"
        )
    return maximum


class EditedRows(NamedTuple):
    """The tokens that a change is applied to."""

    x: Float[Tensor, "batch d_in"]
    """The stream where it is read."""
    h: Float[Tensor, "batch d_out"]
    """The stream where it is changed; the same tensor but for a transcoder."""
    positions: Int[Tensor, " batch"]
    """Absolute positions."""


class Changed(NamedTuple):
    """What becomes of these tokens."""

    h: Float[Tensor, "batch d_out"]
    """The new stream, in fp32 at least."""
    is_changed: Bool[Tensor, " batch"]
    """False where the stream is to be kept to the bit."""


class LatentEdits:
    """All edits of one dictionary, of which each sees the stream before any of them."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        """Take edits of one dictionary.

        Raises:
            ValueError: If a latent is edited twice.
        """
        numbers = [edit.latent for edit in edits]
        if len(set(numbers)) < len(numbers):
            raise MonosemaError(f"edits must name a latent once, got {sorted(numbers)}")
        self.edits = tuple(edits)
        self._dictionary = edits[0].dictionary
        latents = torch.tensor(numbers, device=self._dictionary.dec_rows.device)
        self._read = latent_reader(self._dictionary, latents)
        directions = directions_of(self._dictionary, latents)
        norms = directions.norm(dim=1, keepdim=True)
        for i, edit in enumerate(edits):
            if edit.along is not None:
                directions[i] = edit.along.to(directions) / edit.along.norm() * norms[i]
        self._directions, self._norms = directions, norms[:, 0]

    def __call__(self, rows: EditedRows) -> Changed:
        """Apply h' = h + sum_i (g_i(f_i) - f_i) d_i."""
        h = rows.h.to(self._directions.dtype)
        size = self._dictionary.output_norm(rows.x).size
        f = self._read(rows.x)
        units = h.norm(dim=1, keepdim=True) / (self._norms * size)  # (batch, k)
        pairs = enumerate(zip(self.edits, f.unbind(dim=1), strict=True))
        g = [
            _operate(
                edit, own, edit.value * (units[:, i] if edit.in_norms else torch.ones_like(own))
            )
            for i, (edit, own) in pairs
        ]
        change = torch.stack(g, dim=1) - f
        return Changed(h + change @ self._directions * size, (change != 0).any(dim=1))


def _operate(
    edit: Edit, f: Float[Tensor, " batch"], value: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    match edit.operation:
        case Clamp():
            g = value
        case Add():
            g = f + value
        case Scale():
            g = f * value
        case Ablate():
            g = torch.zeros_like(f)
        case Cap():
            g = torch.minimum(f, value)
        case Floor():
            g = torch.maximum(f, value)
        case _:
            assert_never(edit.operation)
    return torch.where(f != 0, g, f) if edit.only_firing else g


@dataclass(frozen=True, eq=False)
class Calibrate:
    """Several latents, drawn towards an activation of each, at an unchanged norm of the stream.

    h' = |h| g / |g| with g = h + sum_i w_i t_i d_i, where t_i is what latent i is drawn towards and
    w_i its share of all that is lacking, relu(t_i - f_i). With one t for all it is the calibration
    that Wu et al. released (2025, arXiv 2502.15576); where nothing is lacking h stays as it is.
    """

    dictionary: SparseAutoencoder
    """Whose latents they are."""
    latents: tuple[int, ...]
    """Their numbers."""
    target: float | int | str
    """In the dictionary's own units, or "1x max": times the largest activation of each."""

    def __post_init__(self) -> None:
        """Check everything before a model runs."""
        if not self.latents or len(set(self.latents)) < len(self.latents):
            raise MonosemaError(f"latents must be some, each once, got {list(self.latents)}")
        _ = self._parts

    @cached_property
    def _parts(self) -> tuple[Reader, Tensor, Tensor]:
        """What reads the latents, their directions, and what each is drawn towards."""
        values = [Edit(self.dictionary, latent=i, floor=self.target).value for i in self.latents]
        numbers = torch.tensor(self.latents, device=self.dictionary.dec_rows.device)
        directions = directions_of(self.dictionary, numbers)
        reader = latent_reader(self.dictionary, numbers)
        return reader, directions, torch.tensor(values).to(directions)

    def __call__(self, rows: EditedRows) -> Changed:
        """Add what is lacking, and give the stream its norm again."""
        read, directions, target = self._parts
        h = rows.h.to(directions.dtype)
        lacking = (target - read(rows.x)).clamp_min(0)
        total = lacking.sum(dim=1, keepdim=True)
        share = lacking / total.clamp_min(torch.finfo(total.dtype).tiny)
        moved = h + (share * target) @ directions * self.dictionary.output_norm(rows.x).size
        scale = h.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)
        is_lacking = total[:, 0] > 0
        return Changed(torch.where(is_lacking[:, None], moved * scale, h), is_lacking)

    def __str__(self) -> str:
        """Name it in one line."""
        place = self.dictionary.config.hook_point_out
        return f"calibration of {len(self.latents)} latents at {place}"


@dataclass(frozen=True, eq=False)
class Splice:
    """The dictionary's reconstruction in the stream's place: h' = x_hat (+ h - x_hat)."""

    dictionary: SparseAutoencoder
    """Whose reconstruction flows on."""
    keep_error: bool = False
    """Add what the reconstruction lacks, so that only gradients tell the two streams apart."""

    def __call__(self, rows: EditedRows) -> Changed:
        """Reconstruct the rows."""
        x_hat = self.dictionary(rows.x)
        error = (rows.h - x_hat).detach() if self.keep_error else 0.0
        return Changed(
            x_hat + error, torch.ones(len(rows.h), dtype=torch.bool, device=x_hat.device)
        )

    def __str__(self) -> str:
        """Name it in one line."""
        return f"splice at {self.dictionary.config.hook_point_out}"


@dataclass(frozen=True, eq=False)
class Patch:
    """Other rows in the stream's place: from another prompt (see `stream_of`), a mean, or 0."""

    hook_point: str
    """Where."""
    rows: Float[Tensor, "*pos d_out"]
    """(pos, d_out): row p goes to position p, later positions are kept; (d_out): to each."""

    def __call__(self, rows: EditedRows) -> Changed:
        """Put in the rows of their positions."""
        given = self.rows.to(rows.h.device)
        if given.dim() == 1:
            kept = torch.ones_like(rows.positions, dtype=torch.bool)
            return Changed(given.expand_as(rows.h).to(rows.h), kept)
        inside = rows.positions < len(given)
        return Changed(given[rows.positions.clamp(0, len(given) - 1)].to(rows.h), inside)

    def __str__(self) -> str:
        """Name it in one line."""
        return f"patch at {self.hook_point}"


@dataclass(frozen=True, eq=False)
class Push:
    """A constant vector on top of the stream: h' = h + vector; no dictionary is needed."""

    hook_point: str
    """Where."""
    vector: Float[Tensor, " d_out"]
    """In the model's units: of `mean_difference` or `random_direction`, times a strength."""

    def __call__(self, rows: EditedRows) -> Changed:
        """Add the vector."""
        moved = rows.h.to(torch.promote_types(rows.h.dtype, torch.float32)) + self.vector.to(
            rows.h.device
        )
        is_changed = bool((self.vector != 0).any())
        return Changed(moved, torch.full_like(rows.positions, is_changed, dtype=torch.bool))

    def __str__(self) -> str:
        """Name it in one line."""
        return f"push at {self.hook_point}"


Change = Edit | Calibrate | Splice | Patch | Push
