"""Reconstruction from sparse latents: `x_hat = values @ dec_rows[indices] + b_dec`."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_kernels.grads import accumulator, segment_product, segments
from sae_kernels.launch import (
    check_floating,
    check_indices,
    check_shape,
    choose,
)


def sparse_decode_reference(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    dec_rows: Float[Tensor, "d_sae d_out"],
) -> Float[Tensor, "batch d_out"]:
    """Gather the decoder rows, weigh them and add them up."""
    return (values.to(dec_rows.dtype)[:, :, None] * dec_rows[indices.long()]).sum(1)


def weighted_bags(
    weights: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    table: Float[Tensor, "d_sae d_out"],
) -> Float[Tensor, "batch d_out"]:
    """Compute `out[n] = sum over i of weights[n, i] * table[indices[n, i]]`, one bag a row."""
    batch, k = indices.shape
    return torch.embedding_bag(
        table,
        indices.flatten(),
        torch.arange(0, batch * k, k, device=indices.device),
        mode=0,
        per_sample_weights=weights.to(table.dtype).flatten(),
    )[0]


def _row_products(
    grad: Float[Tensor, "batch d_out"],
    table: Float[Tensor, "d_sae d_out"],
    indices: Int[Tensor, "batch k"],
) -> Float[Tensor, "batch k"]:
    """Compute `out[n, i] = <grad[n], table[indices[n, i]]>` without the gathered rows."""
    batch, k = indices.shape
    bags = torch.arange(batch, device=indices.device)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, table, indices.flatten(), bags * k, bags.repeat_interleave(k), 0
    ).view(batch, k)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Float[Tensor, "batch k"],
        indices: Int[Tensor, "batch k"],
        dec_rows: Float[Tensor, "d_sae d_out"],
    ) -> Float[Tensor, "batch d_out"]:
        dec_rows = dec_rows.contiguous()
        ctx.save_for_backward(values, indices, dec_rows)
        return weighted_bags(values, indices, dec_rows)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Float[Tensor, "batch d_out"]
    ) -> tuple[Tensor | None, ...]:
        values, indices, dec_rows = ctx.saved_tensors
        grad = grad.contiguous()
        d_values = d_rows = None
        if ctx.needs_input_grad[0]:
            d_values = _row_products(grad, dec_rows, indices).to(values.dtype)
        if ctx.needs_input_grad[2]:
            parts = segments(indices, len(dec_rows))
            d_rows = segment_product(parts, values, grad).to(dec_rows.dtype)
        return d_values, None, d_rows


def sparse_decode(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"] | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, "batch d_out"]:
    """Compute `x_hat[n] = sum over i of values[n, i] * dec_rows[indices[n, i]] + b_dec`.

    Differentiable once in `values`, `dec_rows` and `b_dec`. The gradient of a value is
    `<grad[n], dec_rows[index]>` also where the value is 0: a caller with a ReLU masks it. An
    index may occur more than once in a row, and padding with value 0 at index 0 adds nothing.

    Args:
        values: latents (batch, k) in the dtype of `dec_rows`; float32 also where that has 16
            bits, as `encode_topk` gives them, and they are then rounded to it.
        indices: latents (batch, k) as integers in 0..d_sae-1.
        dec_rows: one row per latent (d_sae, d_out).
        b_dec: bias (d_out,).
        backend: a forced backend; the fastest one by default.

    Returns:
        x_hat (batch, d_out) in the dtype of `dec_rows`, whatever autocast says.

    Raises:
        ValueError: if shapes, devices, the indices' range or the backend do not fit.
        TypeError: if the indices are no integers, or the dtypes of the others do not fit.
    """
    check_floating(values=values)
    check_floating(dec_rows=dec_rows, b_dec=b_dec)
    if values.dtype != accumulator(dec_rows.dtype):
        check_floating(values=values, dec_rows=dec_rows)
    check_shape("values", values, None, None)
    check_shape("indices", indices, *values.shape)
    check_shape("dec_rows", dec_rows, None, None)
    check_shape("b_dec", b_dec, dec_rows.shape[1])
    check_indices(indices, len(dec_rows))
    with torch.autocast(values.device.type, enabled=False):
        if choose(values, backend) == "reference":
            x_hat = sparse_decode_reference(values, indices, dec_rows)
        else:
            x_hat = _SparseDecode.apply(values, indices.long(), dec_rows)
        return x_hat if b_dec is None else x_hat + b_dec
