"""The activation functions: from encoder to sparse latents, one branch per kind."""

from typing import NamedTuple, assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monosema.checks import MonosemaError
from sae import notebook
from sae.architecture import Activation, BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TopK
from sae_kernels import (
    Csr,
    encode_batch_topk,
    encode_group_max,
    encode_threshold,
    encode_topk,
)


class Latents(NamedTuple):
    """The latents of rows, which may stand in any axes, in sparse form.

    Width is k for TopK, else the largest L0 among the rows. Only values != 0 fire; a place that
    does not fire holds value 0 and index 0; indices are int64 and ascend within a row.
    """

    values: Float[Tensor, "*rows k"]
    """Activations."""
    indices: Int[Tensor, "*rows k"]
    """Latent numbers."""

    def top(self, n: int) -> list[int]:
        """The n latents of the largest activations in all rows, the largest first, each once."""
        order = self.values.detach().flatten().argsort(descending=True, stable=True)
        fires = order[self.values.flatten()[order] > 0]
        return list(dict.fromkeys(self.indices.flatten()[fires].tolist()))[:n]

    def _repr_html_(self) -> str:
        return notebook.latents(self)


class Magnitude(NamedTuple):
    """How a gated latent's activation follows from h, where h > 0: max(h * scale + shift, 0)."""

    scale: Float[Tensor, " d_sae"]
    """exp(r_mag)."""
    shift: Float[Tensor, " d_sae"]
    """b_mag - b_gate * exp(r_mag)."""


class EncoderWeights(NamedTuple):
    """The encoder in latent-major form, as the sparse kernels take it."""

    enc_rows: Float[Tensor, "d_sae d_in"]
    """One contiguous row per latent, times `norms` if there are any."""
    b_enc: Float[Tensor, " d_sae"]
    """Bias per latent, times `norms` if there are any; b_gate for a gated dictionary."""
    b_in: Float[Tensor, " d_in"] | None
    """Subtracted from the input, if any."""
    threshold: Float[Tensor, "*d_sae"] | None = None
    """JumpReLU's (d_sae,) or BatchTopK's single one ()."""
    magnitude: Magnitude | None = None
    """Of a gated dictionary."""
    norms: Float[Tensor, " d_sae"] | None = None
    """What activations are divided by: the decoder's norms, if it gates by them."""


def encode(
    activation: Activation, u: Float[Tensor, "batch d_in"], weights: EncoderWeights
) -> Latents:
    """Activations of the rows `u`, which are in the dictionary's units.

    Raises:
        ValueError: If a BatchTopK dictionary has no threshold, because it was never trained.
    """
    rows, bias, b_in = weights.enc_rows, weights.b_enc, weights.b_in
    match activation:
        case TopK(k=k):
            selected = encode_topk(u, rows, bias, k, b_in=b_in)
            latents = pad_silent(Latents(selected.values, selected.indices))
        case GroupMax(k=k):
            found = encode_group_max(u, rows, bias, k, b_in=b_in)
            latents = pad_silent(Latents(found.values, found.indices))
        case BatchTopK() | JumpReLU():
            latents = from_csr(encode_threshold(u, rows, bias, _threshold(weights), b_in=b_in))
        case Gated():
            open_gates = encode_threshold(u, rows, bias, 0.0, b_in=b_in)
            latents = from_csr(_magnitudes(open_gates, weights))
        case ReLU():
            latents = to_latents(dense_acts(activation, pre_acts(u, weights), weights))
        case _:
            assert_never(activation)
    return ungated(latents, weights)


def _magnitudes(gates: Csr, weights: EncoderWeights) -> Csr:
    """The activations of latents whose gates are open, without those that are 0."""
    assert weights.magnitude is not None
    scale, shift = (part[gates.indices] for part in weights.magnitude)
    values = torch.relu(gates.values * scale + shift)
    kept = values != 0
    before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
    return Csr(values[kept], gates.indices[kept], before[gates.row_ptr])


def ungated(latents: Latents, weights: EncoderWeights) -> Latents:
    """Divide by the norms again that the activation function saw."""
    if weights.norms is None:
        return latents
    return latents._replace(values=latents.values / weights.norms[latents.indices])


def encode_batch(
    activation: BatchTopK, u: Float[Tensor, "batch d_in"], weights: EncoderWeights
) -> Latents:
    """The k * batch largest activations of these rows together, as BatchTopK trains."""
    found = encode_batch_topk(
        u, weights.enc_rows, weights.b_enc, activation.k, b_in=weights.b_in, relu=True
    )
    return ungated(pad_silent(from_csr(found)), weights)


def encode_dense(
    activation: Activation, u: Float[Tensor, "batch d_in"], weights: EncoderWeights
) -> Float[Tensor, "batch d_sae"]:
    """The same activations as one dense row per input row."""
    if activation.facts.trains == "sparse":
        return to_dense(encode(activation, u, weights), weights.enc_rows.shape[0])
    acts = dense_acts(activation, pre_acts(u, weights), weights)
    return acts if weights.norms is None else acts / weights.norms


def dense_acts(
    activation: Activation, pre: Float[Tensor, "batch d_sae"], weights: EncoderWeights
) -> Float[Tensor, "batch d_sae"]:
    """What a dense kind makes of pre-activations, before any division by `norms`."""
    match activation:
        case Gated():
            assert weights.magnitude is not None
            return torch.relu(pre * weights.magnitude.scale + weights.magnitude.shift) * (pre > 0)
        case JumpReLU():
            return pre * (pre > _threshold(weights))
        case ReLU():
            return torch.relu(pre)
        case TopK() | BatchTopK() | GroupMax():
            raise AssertionError(f"{activation.kind} is sparse; see encode")
        case _:
            assert_never(activation)


def _threshold(weights: EncoderWeights) -> Float[Tensor, "*d_sae"]:
    assert weights.threshold is not None
    if weights.threshold.dim() == 0 and bool(weights.threshold.isnan()):
        raise MonosemaError(
            "a batchtopk dictionary must have a threshold to encode, got none; train it, or load "
            "one that was trained"
        )
    return weights.threshold


def threshold_of(activation: Activation, weights: EncoderWeights) -> Float[Tensor, "*d_sae"]:
    """What h must exceed, one for all latents or one for each; 0 where there is no threshold."""
    if activation.facts.threshold == "none":
        return weights.b_enc.new_zeros(())
    return _threshold(weights)


def pre_acts(
    u: Float[Tensor, "batch d_in"], weights: EncoderWeights
) -> Float[Tensor, "batch d_sae"]:
    """Dense pre-activations of rows in the dictionary's units."""
    b_in = weights.b_in
    if b_in is None:
        return torch.addmm(weights.b_enc, u, weights.enc_rows.T)
    # Centring by a constant keeps the gradient of b_in out of a (batch, d_in) product; the term
    # added to the bias is zero and carries that gradient as one matrix-vector product.
    constant = b_in.detach()
    bias = weights.b_enc - weights.enc_rows @ (b_in - constant)
    return torch.addmm(bias, u - constant, weights.enc_rows.T)


def pad_silent(latents: Latents) -> Latents:
    """Bring places that do not fire to value 0 at index 0, in front, so that indices ascend.

    Both tensors are (batch, k). Gradients reach the values unchanged.
    """
    silent = latents.values == 0
    if not bool(silent.any()):
        return latents
    indices, order = latents.indices.masked_fill(silent, 0).sort(dim=1, stable=True)
    # A firing latent 0 sorts among the padding; order inside a run of equal indices is free.
    return Latents(latents.values.gather(1, order), indices)


def to_latents(acts: Float[Tensor, "batch d_sae"]) -> Latents:
    """The non-zero places of dense activations, as wide as the fullest row (at least 1)."""
    fires = acts != 0
    counts = fires.sum(dim=1)
    width = max(int(counts.max()) if acts.shape[0] else 0, 1)
    row, latent = fires.nonzero(as_tuple=True)  # by row, then by latent
    before = counts.cumsum(0) - counts
    place = torch.arange(len(row), device=acts.device) + (width - counts - before)[row]
    values = acts.new_zeros(acts.shape[0], width)
    indices = torch.zeros(acts.shape[0], width, dtype=torch.int64, device=acts.device)
    indices[row, place] = latent
    return Latents(values.index_put((row, place), acts[row, latent]), indices)


def from_csr(found: Csr) -> Latents:
    """Entries row after row as latents as wide as the fullest row (at least 1)."""
    counts = found.row_ptr.diff()
    width = max(int(counts.max()) if len(counts) else 0, 1)
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    entry = torch.arange(len(found.indices), device=counts.device)
    place = entry + (width - counts - found.row_ptr[:-1])[row]
    values = found.values.new_zeros(len(counts), width)
    indices = torch.zeros(len(counts), width, dtype=torch.int64, device=counts.device)
    indices[row, place] = found.indices
    return Latents(values.index_put((row, place), found.values), indices)


def to_dense(latents: Latents, d_sae: int) -> Float[Tensor, "batch d_sae"]:
    """Dense activations (batch, d_sae) of sparse ones."""
    dense = latents.values.new_zeros(latents.values.shape[0], d_sae)
    return dense.scatter_add(1, latents.indices, latents.values)
