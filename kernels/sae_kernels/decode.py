"""Sparse decode: x_hat[n] = sum_j values[n, j] * dec_rows[indices[n, j]] + b_dec."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from sae_kernels.grads import segment_product, sort_by_latent
from sae_kernels.launch import check_floating, check_indices, check_shape, choose


def sparse_decode_reference(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "batch d_out"]:
    """The same by way of dense activations; differentiable by autograd."""
    acts = values.new_zeros(len(values), len(dec_rows)).scatter_add(1, indices, values)
    x_hat = acts @ dec_rows
    return x_hat if b_dec is None else x_hat + b_dec


def weighted_rows(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    rows: Float[Tensor, "d_sae d_out"],
) -> Float[Tensor, "batch d_out"]:
    """Sum k weighted rows for each batch row, without a (batch, k, d_out) temporary."""
    return embedding_bag(indices, rows, mode="sum", per_sample_weights=values.contiguous())


def dots_with_rows(
    grad: Float[Tensor, "batch d_out"],
    indices: Int[Tensor, "batch k"],
    rows: Float[Tensor, "d_sae d_out"],
) -> Float[Tensor, "batch k"]:
    """<grad[n], rows[indices[n, j]]> for every entry, without a (batch, k, d_out) temporary."""
    batch, k = indices.shape
    bags = torch.arange(batch, device=indices.device)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad.contiguous(), rows, indices.reshape(-1), bags * k, bags.repeat_interleave(k), 0
    )
    return dots.view(batch, k)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Float[Tensor, "batch k"],
        indices: Int[Tensor, "batch k"],
        dec_rows: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"] | None,
    ) -> Float[Tensor, "batch d_out"]:
        ctx.save_for_backward(values, indices, dec_rows)
        x_hat = weighted_rows(values, indices, dec_rows)
        return x_hat if b_dec is None else x_hat.add_(b_dec)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Float[Tensor, "batch d_out"]
    ) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        values, indices, dec_rows = ctx.saved_tensors
        needs_values, _, needs_rows, needs_bias = ctx.needs_input_grad
        d_values = dots_with_rows(grad, indices, dec_rows) if needs_values else None
        d_rows = None
        if needs_rows:
            d_rows = segment_product(sort_by_latent(indices, len(dec_rows)), values, grad)
        return d_values, None, d_rows, grad.sum(0) if needs_bias else None


def sparse_decode(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"] | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, "batch d_out"]:
    """Sum k decoder rows per batch row: x_hat = values @ dec_rows[indices] + b_dec.

    Gradients reach values (also where a value is 0), dec_rows and b_dec; none twice.

    Args:
        values: activations (batch, k).
        indices: latents (batch, k), any integer dtype; a latent may stand twice.
        dec_rows: decoder, one row per latent (d_sae, d_out).
        b_dec: bias (d_out,), if any.
        backend: a forced backend; the fastest one by default.

    Raises:
        ValueError: if shapes, the range of the indices or the backend are wrong.
        TypeError: if dtypes are wrong.
    """
    check_shape("values", values, None, None)
    check_shape("indices", indices, *values.shape)
    check_shape("dec_rows", dec_rows, None, None)
    check_shape("b_dec", b_dec, dec_rows.shape[1])
    check_floating(values=values, dec_rows=dec_rows, b_dec=b_dec)
    check_indices(indices, len(dec_rows))
    if choose(values, backend) == "reference":
        return sparse_decode_reference(values, indices.long(), dec_rows, b_dec)
    return _SparseDecode.apply(values, indices.long(), dec_rows.contiguous(), b_dec)  # pyright: ignore[reportReturnType]
