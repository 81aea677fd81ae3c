"""Gradients of latent-major weights from sparse activations, without atomics and without scatter.

Entries (row n, latent j, coefficient c) are sorted by latent once; a weight's gradient is then one
sum per latent over its own run of entries: dW[j] = sum_e c_e rows[n_e]. The order inside a run is
that of the rows, so equal inputs give equal bits.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from sae_kernels.launch import check_floating, check_indices, check_shape, choose


class Segments(NamedTuple):
    """The entries of sparse activations in the order of their latents."""

    order: Int[Tensor, " entry"]
    """Positions in the flattened (batch, k) entries, by latent, then by row."""
    starts: Int[Tensor, " d_sae"]
    """Where each latent's run begins in `order`; an empty run begins where the next one does."""
    k: int
    """Entries per row."""


class WeightGrads(NamedTuple):
    """Gradients of an autoencoder's latent-major weights."""

    dec_rows: Float[Tensor, "d_sae d_out"]
    """sum over entries of latent j: value * grad_out[row]."""
    enc_rows: Float[Tensor, "d_sae d_in"]
    """sum over entries of latent j: d_value * x[row]."""
    b_enc: Float[Tensor, " d_sae"]
    """sum over entries of latent j: d_value."""
    n_fired: Int[Tensor, " d_sae"]
    """Entries of latent j whose value is not 0."""


def sort_by_latent(indices: Int[Tensor, "batch k"], d_sae: int) -> Segments:
    """Sort the entries by latent; within a latent the rows ascend."""
    flat = indices.reshape(-1).long()
    counts = torch.bincount(flat, minlength=d_sae)
    starts = counts.cumsum(0) - counts
    if flat.device.type == "cpu":
        # numpy sorts packed 64-bit keys with AVX-512, some 100 times faster than torch.sort.
        n = max(flat.numel(), 1)
        keys = flat.numpy() * n + np.arange(flat.numel())
        keys.sort()
        order = torch.from_numpy(keys % n)
    else:
        order = torch.sort(flat, stable=True).indices
    return Segments(order, starts, indices.shape[1])


def segment_product(
    segments: Segments, coefficients: Float[Tensor, "batch k"], rows: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "d_sae d_model"]:
    """Sum coefficient * row over each latent's entries: embedding_bag with latents as bags."""
    weights = coefficients.reshape(-1).to(rows.dtype)[segments.order]
    return embedding_bag(
        segments.order // segments.k,
        rows.contiguous(),
        segments.starts,
        mode="sum",
        per_sample_weights=weights,
    )


def segment_sum(
    segments: Segments, coefficients: Float[Tensor, "batch k"]
) -> Float[Tensor, " d_sae"]:
    """Sum the coefficients over each latent's entries."""
    column = coefficients.reshape(-1, 1).contiguous()
    return embedding_bag(segments.order, column, segments.starts, mode="sum").squeeze(1)


def _reference(
    values: Float[Tensor, "batch k"],
    d_values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    grad_out: Float[Tensor, "batch d_out"],
    x: Float[Tensor, "batch d_in"],
    d_sae: int,
) -> WeightGrads:
    acts = values.new_zeros(len(values), d_sae).scatter_add(1, indices, values)
    d_acts = values.new_zeros(len(values), d_sae).scatter_add(1, indices, d_values)
    fired = torch.zeros(len(values), d_sae, dtype=torch.int64, device=values.device)
    fired.scatter_add_(1, indices, (values != 0).long())
    return WeightGrads(acts.T @ grad_out, d_acts.T @ x, d_acts.sum(0), fired.sum(0))


def sparse_weight_grads(
    values: Float[Tensor, "batch k"],
    d_values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    grad_out: Float[Tensor, "batch d_out"],
    x: Float[Tensor, "batch d_in"],
    d_sae: int,
    *,
    backend: str | None = None,
) -> WeightGrads:
    """Gradients of decoder rows, encoder rows and encoder bias, from one sort of the entries.

    Args:
        values: activations (batch, k).
        d_values: gradient of the loss with respect to the pre-activations of the entries.
        indices: latents of the entries (batch, k).
        grad_out: gradient with respect to the reconstruction (batch, d_out).
        x: what the encoder read (batch, d_in), centred if it centres.
        d_sae: number of latents.
        backend: a forced backend; the fastest one by default.

    Raises:
        ValueError: if shapes, the range of the indices or the backend are wrong.
        TypeError: if dtypes are wrong.
    """
    batch, k = values.shape
    check_floating(values=values, d_values=d_values, grad_out=grad_out, x=x)
    for name, tensor in (("d_values", d_values), ("indices", indices)):
        check_shape(name, tensor, batch, k)
    for name, tensor in (("grad_out", grad_out), ("x", x)):
        check_shape(name, tensor, batch, None)
    check_indices(indices, d_sae)
    indices = indices.long()
    if choose(values, backend) == "reference":
        return _reference(values, d_values, indices, grad_out, x, d_sae)
    segments = sort_by_latent(indices, d_sae)
    return WeightGrads(
        segment_product(segments, values, grad_out),
        segment_product(segments, d_values, x),
        segment_sum(segments, d_values),
        torch.bincount(indices[values != 0], minlength=d_sae),
    )
