"""Reconstruction from sparse latents: `x_hat = values @ dec_rows[indices] + b_dec`.

Rows hold k latents each, as (batch, k), or any number, as (entry,) with a row pointer (CSR).

As `torch.compile` sees it the op is opaque, with shapes for its tracing and with a gradient. The
operator calls the public function, which checks the arguments when the compiled code runs; its
annotations are bare tensors, because torch reads the operator's schema from them.
"""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_kernels.grads import accumulator, segment_product
from sae_kernels.launch import (
    Backend,
    Entries,
    KernelError,
    check_floating,
    check_indices,
    check_shape,
    choose,
    rows_of,
)


def sparse_decode_reference(
    values: Float[Tensor, "batch k"] | Float[Tensor, " entry"],
    indices: Int[Tensor, "batch k"] | Int[Tensor, " entry"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    row_ptr: Int[Tensor, " bound"] | None = None,
) -> Float[Tensor, "batch d_out"]:
    """Gather the decoder rows, weigh them and add them up."""
    weighed = values.to(dec_rows.dtype)[..., None] * dec_rows[indices.long()]
    if row_ptr is None:
        return weighed.sum(1)
    x_hat = dec_rows.new_zeros(len(row_ptr) - 1, dec_rows.shape[1])
    return x_hat.index_add(0, rows_of(row_ptr, len(values)), weighed)


def weighted_rows(
    weights: Float[Tensor, "batch k"] | Float[Tensor, " entry"],
    indices: Int[Tensor, "batch k"] | Int[Tensor, " entry"],
    table: Float[Tensor, "d_sae d_out"],
    row_ptr: Int[Tensor, " bound"] | None = None,
    backend: Backend = "torch",
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch d_out"]:
    """Compute `out[n] = sum over i of weights[n, i] * table[indices[n, i]]`, one bag a row.

    In the dtype of the table, or in the given one.
    """
    table = table.contiguous()
    if backend == "triton":
        from sae_kernels import decode_triton

        weights, indices = weights.contiguous(), indices.contiguous()
        if row_ptr is None:
            return decode_triton.weighted_rows(weights, indices, table, dtype)
        return decode_triton.csr_weighted_rows(weights, indices, row_ptr.contiguous(), table, dtype)
    result = torch.embedding_bag(
        table,
        indices.flatten(),
        _starts(indices, row_ptr),
        mode=0,
        per_sample_weights=weights.to(table.dtype).flatten(),
    )[0]
    return result if dtype is None else result.to(dtype)


def row_products(
    grad: Float[Tensor, "batch d_out"],
    table: Float[Tensor, "d_sae d_out"],
    indices: Int[Tensor, "batch k"] | Int[Tensor, " entry"],
    row_ptr: Int[Tensor, " bound"] | None = None,
    backend: Backend = "torch",
) -> Float[Tensor, "batch k"] | Float[Tensor, " entry"]:
    """Compute `out[n, i] = <grad[n], table[indices[n, i]]>` without the gathered rows."""
    grad, table = grad.contiguous(), table.contiguous()
    if backend == "triton":
        from sae_kernels import decode_triton

        indices = indices.contiguous()
        if row_ptr is None:
            return decode_triton.row_products(grad, table, indices)
        return decode_triton.csr_row_products(grad, table, indices, row_ptr.contiguous())
    starts = _starts(indices, row_ptr)
    if row_ptr is None:
        row = torch.arange(len(indices), device=indices.device)
        row = row.repeat_interleave(indices.shape[1])
    else:
        row = rows_of(row_ptr, len(indices))
    flat = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, table, indices.flatten(), starts, row, 0
    )
    return flat.view(indices.shape)


def _starts(
    indices: Int[Tensor, "batch k"] | Int[Tensor, " entry"], row_ptr: Int[Tensor, " bound"] | None
) -> Int[Tensor, " batch"]:
    """Name the first entry of each row."""
    if row_ptr is not None:
        return row_ptr[:-1]
    return torch.arange(len(indices), device=indices.device) * indices.shape[1]


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Float[Tensor, "batch k"] | Float[Tensor, " entry"],
        indices: Int[Tensor, "batch k"] | Int[Tensor, " entry"],
        dec_rows: Float[Tensor, "d_sae d_out"],
        row_ptr: Int[Tensor, " bound"] | None,
        backend: Backend,
    ) -> Float[Tensor, "batch d_out"]:
        ctx.save_for_backward(values, indices, dec_rows, row_ptr)
        ctx.backend = backend
        return weighted_rows(values, indices, dec_rows, row_ptr, backend)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Float[Tensor, "batch d_out"]
    ) -> tuple[Tensor | None, ...]:
        values, indices, dec_rows, row_ptr = ctx.saved_tensors
        d_values = d_rows = None
        if ctx.needs_input_grad[0]:
            d_values = row_products(grad, dec_rows, indices, row_ptr, ctx.backend)
            d_values = d_values.to(values.dtype)
        if ctx.needs_input_grad[2]:
            entries = Entries(indices, len(dec_rows), row_ptr)
            d_rows = segment_product(entries, values, grad, ctx.backend).to(dec_rows.dtype)
        return d_values, None, d_rows, None, None


def check_row_ptr(row_ptr: Shaped[Tensor, "..."], n_entries: int) -> None:
    """Refuse bounds that do not rise from 0 to the number of entries; read on a CPU only."""
    check_shape("row_ptr", row_ptr, None)
    if row_ptr.dtype.is_floating_point or row_ptr.dtype == torch.bool:
        raise TypeError(f"row_ptr must be integers, got {row_ptr.dtype}")
    if not len(row_ptr):
        raise KernelError("row_ptr must have one bound more than there are rows, got none")
    if row_ptr.device.type == "cpu":
        first, last, rises = int(row_ptr[0]), int(row_ptr[-1]), bool((row_ptr.diff() >= 0).all())
        if first != 0 or last != n_entries or not rises:
            raise KernelError(
                f"row_ptr must rise from 0 to the number of entries, {n_entries}, got bounds from "
                f"{first} to {last}" + ("" if rises else " that fall in between")
            )


def sparse_decode(
    values: Float[Tensor, "batch k"] | Float[Tensor, " entry"],
    indices: Int[Tensor, "batch k"] | Int[Tensor, " entry"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"] | None = None,
    *,
    row_ptr: Int[Tensor, " bound"] | None = None,
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
        row_ptr: bounds (batch + 1,), where values and indices are (entry,): row n has the entries
            `row_ptr[n]:row_ptr[n + 1]`, as `encode_threshold` gives them.
        backend: a forced backend; the fastest one by default.

    Returns:
        x_hat (batch, d_out) in the dtype of `dec_rows`, whatever autocast says.

    Raises:
        ValueError: if shapes, devices, the indices' range, the bounds or the backend do not fit.
        TypeError: if the indices or bounds are no integers, or the others' dtypes do not fit.
    """
    if torch.compiler.is_compiling() and row_ptr is None:
        return _compiled_decode(values, indices, dec_rows, b_dec, backend)
    check_floating(values=values)
    check_floating(dec_rows=dec_rows, b_dec=b_dec)
    if values.dtype != accumulator(dec_rows.dtype):
        check_floating(values=values, dec_rows=dec_rows)
    check_shape("values", values, *([None] if row_ptr is not None else [None, None]))
    check_shape("indices", indices, *values.shape)
    check_shape("dec_rows", dec_rows, None, None)
    check_shape("b_dec", b_dec, dec_rows.shape[1])
    check_indices(indices, len(dec_rows))
    if row_ptr is not None:
        check_row_ptr(row_ptr, len(values))
        row_ptr = row_ptr.long()
    with torch.autocast(values.device.type, enabled=False):
        name = choose(values, backend)
        if name == "reference":
            x_hat = sparse_decode_reference(values, indices, dec_rows, row_ptr)
        else:
            x_hat = _SparseDecode.apply(values, indices.long(), dec_rows, row_ptr, name)
        return x_hat if b_dec is None else x_hat + b_dec


@torch.library.custom_op("sae_kernels::decode", mutates_args=())
def _decode_op(values: Tensor, indices: Tensor, dec_rows: Tensor, backend: str | None) -> Tensor:
    return sparse_decode(values, indices, dec_rows, backend=backend)


@_decode_op.register_fake
def _(values: Tensor, _indices: Tensor, dec_rows: Tensor, *_: Any) -> Tensor:
    return dec_rows.new_empty(values.shape[0], dec_rows.shape[1])


@torch.library.custom_op("sae_kernels::decode_grads", mutates_args=())
def _decode_grads_op(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    dec_rows: Tensor,
    backend: str | None,
    needs: list[bool],
) -> list[Tensor]:
    name, indices = choose(values, backend), indices.long()
    d_values = d_rows = values.new_empty(0)
    if needs[0]:
        d_values = row_products(grad, dec_rows, indices, backend=name).to(values.dtype)
    if needs[1]:
        entries = Entries(indices, len(dec_rows))
        d_rows = segment_product(entries, values, grad, name).to(dec_rows.dtype)
    return [d_values, d_rows]


@_decode_grads_op.register_fake
def _(_grad: Tensor, values: Tensor, _indices: Tensor, dec_rows: Tensor, *rest: Any) -> Any:
    needs = rest[-1]
    pairs = zip((values, dec_rows), needs, strict=True)
    return [t.new_empty(t.shape) if need else values.new_empty(0) for t, need in pairs]


def _keep_for_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    d_values, d_rows = _decode_grads_op(grad, *ctx.saved_tensors, ctx.backend, needs)
    return d_values if needs[0] else None, None, d_rows if needs[1] else None, None


_decode_op.register_autograd(_decode_backward, setup_context=_keep_for_decode)


def _compiled_decode(
    values: Tensor, indices: Tensor, dec_rows: Tensor, b_dec: Tensor | None, backend: str | None
) -> Tensor:
    """Decode by an operator, and add the bias."""
    x_hat = _decode_op(values, indices, dec_rows, backend)
    return x_hat if b_dec is None else x_hat + b_dec
