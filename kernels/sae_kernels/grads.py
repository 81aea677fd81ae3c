"""Gradients of the weights from sparse latents, deterministic and without atomics.

The (row, latent) entries are sorted by latent once. Each latent is then a bag of batch rows, so a
weight gradient is the same operation as decoding: `torch.embedding_bag` with the latents as bags.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kernels.launch import (
    Backend,
    Entries,
    Segments,
    WeightGrads,
    check_floating,
    check_indices,
    check_shape,
    choose,
    counts,
)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype in which sums of `dtype` are formed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def segment_product(
    entries: Entries,
    weights: Float[Tensor, "batch k"] | Float[Tensor, " entry"],
    rows: Float[Tensor, "batch d_out"],
    backend: Backend = "torch",
) -> Float[Tensor, "d_sae d_out"]:
    """Compute `out[j] = sum of weights[n, i] * rows[n]` over the entries (n, i) of latent j."""
    return product_of(entries.segments, weights, rows, backend)


def product_of(
    parts: Segments,
    weights: Float[Tensor, "batch k"] | Float[Tensor, " entry"],
    rows: Float[Tensor, "batch d_out"],
    backend: Backend,
) -> Float[Tensor, "d_sae d_out"]:
    """Do the same with entries that are sorted already."""
    dtype = accumulator(rows.dtype)
    if backend == "triton":
        from sae_kernels import grads_triton

        return grads_triton.segment_product(parts, weights.flatten(), rows.contiguous())
    return torch.embedding_bag(
        rows.to(dtype).contiguous(),
        parts.rows,
        parts.starts,
        mode=0,
        per_sample_weights=weights.to(dtype).flatten()[parts.entries],
    )[0]


def product_and_square(
    parts: Segments,
    weights: Float[Tensor, "batch k"] | Float[Tensor, " entry"],
    rows: Float[Tensor, "batch d_out"],
    backend: Backend,
) -> tuple[Float[Tensor, "d_sae d_out"], Float[Tensor, ""] | None]:
    """Do the same, with the sum of the squares where the kernel has it in hand."""
    if backend != "triton":
        return product_of(parts, weights, rows, backend), None
    from sae_kernels import grads_triton

    return grads_triton.product_and_square(parts, weights.flatten(), rows.contiguous())


def segment_sum(
    entries: Entries, weights: Float[Tensor, "batch k"] | Float[Tensor, " entry"]
) -> Float[Tensor, " d_sae"]:
    """Compute `out[j] = sum of weights[n, i]` over the entries (n, i) of latent j."""
    return sum_of(entries.segments, weights)


def sum_of(
    parts: Segments, weights: Float[Tensor, "batch k"] | Float[Tensor, " entry"]
) -> Float[Tensor, " d_sae"]:
    """Do the same with entries that are sorted already."""
    ordered = weights.to(accumulator(weights.dtype)).flatten()[parts.entries]
    return torch.segment_reduce(ordered, "sum", lengths=parts.lengths, unsafe=True)


def _count_fired(
    values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"], d_sae: int
) -> Int[Tensor, " d_sae"]:
    return counts(indices, d_sae, values != 0)


def sparse_weight_grads_reference(
    values: Float[Tensor, "batch k"],
    d_values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    grad_out: Float[Tensor, "batch d_out"],
    x: Float[Tensor, "batch d_in"],
    d_sae: int,
) -> WeightGrads:
    """Write the latents into dense matrices and multiply."""
    dtype = accumulator(values.dtype)
    dense = torch.zeros(len(values), d_sae, dtype=dtype, device=values.device)
    acts = dense.scatter_add(1, indices.long(), values.to(dtype))
    d_pre = dense.scatter_add(1, indices.long(), d_values.to(dtype))
    return WeightGrads(
        acts.T @ grad_out.to(dtype),
        d_pre.T @ x.to(dtype),
        d_pre.sum(0),
        _count_fired(values, indices, d_sae),
    )


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
    """Compute every weight gradient of a sparse step from one sort of its entries.

    Over the entries (n, i) with `indices[n, i] = j`:
    `dec_rows[j] = sum of values * grad_out[n]`, `enc_rows[j] = sum of d_values * x[n]`,
    `b_enc[j] = sum of d_values`, `n_fired[j] = number of values != 0`. An index may occur more
    than once in a row. Runs repeat bit by bit. Not differentiable.

    Args:
        values: latents (batch, k).
        d_values: gradient of the values (batch, k), already masked by the activation.
        indices: latents (batch, k) as integers in 0..d_sae-1.
        grad_out: gradient of the reconstruction (batch, d_out).
        x: what the encoder multiplied (batch, d_in): centred where the encoder centres.
        d_sae: number of latents.
        backend: a forced backend; the fastest one by default.

    Raises:
        ValueError: if shapes, devices, the indices' range or the backend do not fit.
        TypeError: if the indices are no integers, or the other tensors differ in dtype.
    """
    check_floating(values=values, d_values=d_values, grad_out=grad_out, x=x)
    check_shape("values", values, None, None)
    batch, k = values.shape
    check_shape("d_values", d_values, batch, k)
    check_shape("indices", indices, batch, k)
    check_shape("grad_out", grad_out, batch, None)
    check_shape("x", x, batch, None)
    check_indices(indices, d_sae)
    with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
        name = choose(values, backend)
        if name == "reference":
            return sparse_weight_grads_reference(values, d_values, indices, grad_out, x, d_sae)
        if name == "triton":
            from sae_kernels import grads_triton

            latents = (values.contiguous(), d_values.contiguous(), indices.contiguous())
            rows = (grad_out.contiguous(), x.contiguous())
            return WeightGrads(*grads_triton.weight_grads(*latents, *rows, d_sae))
        entries = Entries(indices, d_sae)
        return WeightGrads(
            segment_product(entries, values, grad_out),
            segment_product(entries, d_values, x),
            segment_sum(entries, d_values),
            _count_fired(values, indices, d_sae),
        )
