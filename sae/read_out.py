"""How latents are read from a row: by the encoder alone, or refined.

The refined read-out asks of each latent what all others leave of the row for it. With u the row,
y(a) = a @ W_dec + b_dec, d_i and e_i a latent's rows of the decoder and the encoder:

    r = u - y(encode(u));  h_i += r . e_i / 2       for latents that fire or nearly do
    a = activation(h);     r = u - y(a);            p_i = r . d_i / |d_i| + a_i |d_i|
    a_i = 0 unless p_i > tau_i; r = u - y(a);        a_i += 3/4 r . d_i / |d_i|^2  where a_i > 0

The first line encodes the row with half of what its latents left of it added, a step of an iterated
soft thresholding (Gregor and LeCun 2010). p_i is the length along d_i of the row without all other
latents; it stays the same if length moves between a direction and its activation. The last line
gives back what the encoder's shrinkage took. Directions stay what they are. Only rows of few
latents are multiplied, so that the cost is below two encodings.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, assert_never, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from monosema.checks import MonosemaError, at_least, require
from sae import activations
from sae.activations import EncoderWeights, Latents
from sae.architecture import (
    Activation,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    ReLU,
    SAEConfig,
    TopK,
)
from sae_kernels import Csr, encode_group_max, encode_threshold, encode_topk, sparse_decode
from sae_kernels.decode import row_products
from sae_kernels.launch import choose

ReadOutName = Literal["linear", "refined"]
"""By the encoder alone, or refined."""
READ_OUTS: tuple[ReadOutName, ...] = ("linear", "refined")

STEP, LAST_STEP = 0.5, 0.75
"""Of what latents leave of a row, the part that is added before the second encoding and after."""

NEAR, WIDER = 2, 1.5
"""Under TopK, latents of a row that may fire in the second encoding and that do, in units of k."""

NEAR_AT_LEAST = 64
"""So many latents of a row may fire in the second encoding however few do in the first."""


@runtime_checkable
class LatentStats(Protocol):
    """What `sae evaluate` counted of a dictionary's latents (`sae.metrics.Firing`)."""

    n_rows: int
    """Rows that were encoded."""
    n_fired: Int[Tensor, " d_sae"]
    """In how many of them each latent fired."""
    max_activation: Float[Tensor, " d_sae"]
    """The largest activation of each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadOut:
    """What the refined read-out needs beside the weights; `sae.run.refine` sets it from rows."""

    tau: Float[Tensor, " d_sae"]
    """What p_i must exceed, for each latent, in the dictionary's units."""
    margin: float = 0.0
    """How far below its threshold a latent may be in the first encoding to fire in the second."""
    made_from: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The rows that it was set on; recorded, never compared."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("margin", self.margin, 0)
        least = float(self.tau.min())
        require(bool(self.tau.isfinite().all()) and least >= 0, "tau", "be at least 0", least)

    @property
    def sha256(self) -> str:
        """A hash of all that decides latents."""
        data = self.tau.cpu().contiguous().numpy().tobytes() + repr(self.margin).encode()
        return hashlib.sha256(data).hexdigest()


class Decoder(NamedTuple):
    """What takes latents back to the row that they were read from."""

    rows: Float[Tensor, "d_sae d_in"]
    """The directions."""
    bias: Float[Tensor, " d_in"]
    """b_dec."""
    scale: float = 1.0
    """The units of the output over those of the input."""

    def left(self, u: Float[Tensor, "batch d_in"], latents: Csr) -> Float[Tensor, "batch d_in"]:
        """What latents leave of rows, in the units of the output."""
        values, indices, row_ptr = latents
        return u * self.scale - sparse_decode(
            values, indices, self.rows, self.bias, row_ptr=row_ptr
        )

    def norms(self, indices: Int[Tensor, " entry"]) -> Float[Tensor, " entry"]:
        """Norms of directions; a latent without one has a tiny one rather than 0."""
        norms = torch.linalg.vector_norm(self.rows, dim=1)
        return norms.clamp_min(torch.finfo(norms.dtype).tiny ** 0.5)[indices]


class Refinable(NamedTuple):
    """Latents that fire in the second encoding, before any of them is left out."""

    near: Csr
    """Pre-activations of the first encoding; they carry the gradients."""
    place: Int[Tensor, " entry"]
    """Which of these fire, ascending."""
    values: Float[Tensor, " entry"]
    """Their activations."""
    lengths: Float[Tensor, " entry"]
    """p_i of each."""

    def above(self, tau: Float[Tensor, " d_sae"]) -> "Refinable":
        """Those whose p_i exceeds the latent's tau."""
        return self.part(self.lengths > tau.to(self.lengths)[self.near.indices[self.place]])

    def part(self, kept: Bool[Tensor, " entry"]) -> "Refinable":
        """Some of them."""
        fields = (part[kept] for part in self[1:])
        return Refinable(self.near, *fields)

    @property
    def latents(self) -> Csr:
        """The activations, row after row."""
        # Places ascend, so the bounds of rows are found among them.
        row_ptr = torch.searchsorted(self.place, self.near.row_ptr)
        return Csr(self.values, self.near.indices[self.place], row_ptr)


def candidates(
    activation: Activation,
    u: Float[Tensor, "batch d_in"],
    weights: EncoderWeights,
    decoder: Decoder,
    margin: float,
) -> Refinable:
    """Encode rows, encode what is near to firing again, and measure what each latent is left.

    Args:
        activation: Which latents fire.
        u: Rows in the dictionary's units.
        weights: The encoder.
        decoder: Takes latents back to these rows.
        margin: How far below its threshold a latent may be to count as near.
    """
    near = _near(activation, u, weights, margin)
    with torch.no_grad(), torch.autocast(u.device.type, enabled=False):
        none = near.values.new_zeros(0)

        def firing(h: Float[Tensor, " entry"], wider: float) -> Refinable:
            place = _fires(activation, h, near, weights, wider).nonzero().squeeze(1)
            return Refinable(near, place, _acts(h[place], near.indices[place], weights), none)

        left = decoder.left(u, firing(near.values, 1.0).latents)
        more = _products(left * (STEP / decoder.scale), weights.enc_rows, near)
        again = firing(near.values + more, WIDER)
        latents = again.latents
        norms = decoder.norms(latents.indices)
        left = _products(decoder.left(u, latents), decoder.rows, latents)
        return again._replace(lengths=left / norms + latents.values * norms)


def encode_refined(
    activation: Activation,
    u: Float[Tensor, "batch d_in"],
    weights: EncoderWeights,
    decoder: Decoder,
    read_out: ReadOut,
) -> Latents:
    """The refined latents of rows in the dictionary's units.

    Their gradients are those of the encoder's activations where a refined latent fires: what
    fires, and what is added to the encoder's activation, are constants.
    """
    found = candidates(activation, u, weights, decoder, read_out.margin).above(read_out.tau)
    with torch.no_grad(), torch.autocast(u.device.type, enabled=False):
        latents = found.latents
        left = _products(decoder.left(u, latents), decoder.rows, latents)
        longer = left / decoder.norms(latents.indices).square()
        found = found._replace(values=found.values + LAST_STEP * longer)
        found = found.part(found.values > 0)
    latents = found.latents
    linear = _acts(found.near.values[found.place], latents.indices, weights)
    return activations.from_csr(latents._replace(values=latents.values + linear - linear.detach()))


def _near(
    activation: Activation,
    u: Float[Tensor, "batch d_in"],
    weights: EncoderWeights,
    margin: float,
) -> Csr:
    """Pre-activations of the latents that fire or nearly do."""
    rows, bias, b_in = weights.enc_rows, weights.b_enc, weights.b_in
    match activation:
        case TopK(k=k):
            n = min(max(NEAR * k, NEAR_AT_LEAST), len(rows))
            found = encode_topk(u, rows, bias, n, b_in=b_in, relu=False)
        case GroupMax(k=k):
            found = encode_group_max(u, rows, bias, k, b_in=b_in, relu=False)
        case ReLU() | Gated() | JumpReLU() | BatchTopK():
            theta = activations.threshold_of(activation, weights)
            return encode_threshold(u, rows, bias, theta - margin, b_in=b_in)
        case _:
            assert_never(activation)
    width = found.indices.shape[1]
    bounds = torch.arange(len(u) + 1, device=u.device) * width
    return Csr(found.values.flatten(), found.indices.flatten(), bounds)


def _fires(
    activation: Activation,
    h: Float[Tensor, " entry"],
    near: Csr,
    weights: EncoderWeights,
    wider: float,
) -> Bool[Tensor, " entry"]:
    """Which pre-activations fire; under TopK so many times k of a row."""
    match activation:
        case TopK(k=k):
            width = len(h) // max(len(near.row_ptr) - 1, 1)
            pre = h.view(-1, width)
            best = pre.topk(min(math.ceil(wider * k), width), dim=1).indices
            return torch.zeros_like(pre, dtype=torch.bool).scatter_(1, best, True).flatten() & (
                h > 0
            )
        case GroupMax():
            return h > 0
        case ReLU() | Gated() | JumpReLU() | BatchTopK():
            theta = activations.threshold_of(activation, weights)
            return h > (theta if theta.dim() == 0 else theta[near.indices])
        case _:
            assert_never(activation)


def _acts(
    h: Float[Tensor, " entry"], indices: Int[Tensor, " entry"], weights: EncoderWeights
) -> Float[Tensor, " entry"]:
    """Activations of pre-activations that fire."""
    if weights.magnitude is not None:
        scale, shift = (part[indices] for part in weights.magnitude)
        h = torch.relu(h * scale + shift)
    return h if weights.norms is None else h / weights.norms[indices]


def _products(
    rows: Float[Tensor, "batch d_in"], table: Float[Tensor, "d_sae d_in"], entries: Csr
) -> Float[Tensor, " entry"]:
    """<row, table[latent]> of each entry."""
    backend = choose(rows, None)
    return row_products(rows, table, entries.indices, entries.row_ptr, backend)


def require_refinable(config: SAEConfig) -> None:
    """Refuse a dictionary whose output is not the row that it reads.

    Raises:
        MonosemaError: If it predicts other rows.
    """
    read, predicted = (
        [part.hook_point for part in parts] for parts in (config.slices_in, config.slices_out)
    )
    wrong = {
        f"one that predicts {' and '.join(predicted)} from {' and '.join(read)}": read != predicted,
        f"d_out={config.width_out} and d_in={config.d_in}": config.width_out != config.d_in,
        "skip=True": config.skip,
        "undo_norm=False": config.input_norm != "none" and not config.undo_norm,
    }
    got = next((what for what, holds in wrong.items() if holds), None)
    if got is not None:
        raise MonosemaError(
            f"read_out must be 'linear' for a dictionary that does not predict what it reads, got "
            f"'refined' for {got}; leave it out"
        )


def checked(read_out: str) -> ReadOutName:
    """Return the name of a read-out.

    Raises:
        MonosemaError: If there is none of this name.
    """
    rule = f"be one of {', '.join(map(repr, READ_OUTS))}"
    require(read_out in READ_OUTS, "read_out", rule, read_out)
    return READ_OUTS[READ_OUTS.index(read_out)]


R = TypeVar("R", bound="Readable")


class Readable(nn.Module):
    """What a dictionary knows of how its latents are read, and what was counted of them so."""

    config: SAEConfig

    def __init__(self) -> None:
        """Know nothing."""
        super().__init__()
        self.read_by: ReadOutName = "linear"
        """What `encode` does if it is not said."""
        self._read_out: ReadOut | Callable[[], ReadOut | None] | None = None
        self._stats: dict[str, LatentStats | Callable[[], LatentStats | None] | None] = {}

    def reading(self: R, read_out: ReadOutName) -> R:
        """The same dictionary, with the same parameters, that is read in this way.

        Evaluation, explaining, steering and the browser take it like any other.

        Raises:
            ValueError: If the name is another one, or the refined read-out was never set.
        """
        if checked(read_out) == self.read_by:
            return self
        if read_out == "refined":
            self.require_read_out()
        other = copy.copy(self)
        other.read_by = read_out
        return other

    def require_read_out(self) -> ReadOut:
        """What the refined read-out needs.

        Raises:
            ValueError: If nobody set it, or the dictionary has none.
        """
        require_refinable(self.config)
        if self.read_out is None:
            raise MonosemaError(
                "a refined read-out must be set from rows before it is used, got a dictionary "
                "without one; run `sae refine DICT --cache CACHE` (sae.run.refine)"
            )
        return self.read_out

    @property
    def read_out(self) -> ReadOut | None:
        """What the refined read-out needs, if it was set; read when first asked for."""
        if callable(self._read_out):
            self._read_out = self._read_out()
        return self._read_out

    @read_out.setter
    def read_out(self, read_out: ReadOut | Callable[[], ReadOut | None] | None) -> None:
        d_sae = self.config.d_sae
        n = len(read_out.tau) if isinstance(read_out, ReadOut) else d_sae
        if n != d_sae:
            raise MonosemaError(f"read_out must be of a dictionary with d_sae={d_sae}, got {n}")
        self._read_out = read_out

    @property
    def stats(self) -> LatentStats | None:
        """What `sae evaluate` counted of its latents as they are read, if it did."""
        stats = self._stats.get(self.read_by)
        if not callable(stats):
            return stats
        found = stats()
        if found is not None:
            self._stats[self.read_by] = found
        return found

    @stats.setter
    def stats(self, stats: LatentStats | Callable[[], LatentStats | None] | None) -> None:
        self.set_stats(stats, self.read_by)

    def set_stats(
        self, stats: LatentStats | Callable[[], LatentStats | None] | None, read_by: ReadOutName
    ) -> None:
        """Keep what was counted of its latents, read in one way.

        Raises:
            ValueError: If it was counted of another number of latents.
        """
        d_sae = self.config.d_sae
        n = d_sae if stats is None or callable(stats) else len(stats.max_activation)
        if n != d_sae:
            raise MonosemaError(f"stats must be of a dictionary with d_sae={d_sae}, got {n}")
        self._stats[read_by] = stats
