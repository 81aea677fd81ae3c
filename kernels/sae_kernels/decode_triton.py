"""Triton kernels of decoding: weighted sums of gathered rows, and products with them.

Sums are float32 whatever the dtype of the rows. The entries of a batch row are `k` columns of
`values` and `indices`, or, in compressed sparse rows (CSR), those from `row_ptr[n]` to
`row_ptr[n + 1]`.

Where Triton's kernels run: compiled on a GPU, or on the CPU in the interpreter.
"""

# ruff: noqa: PLR0913
# pyright: reportCallIssue=false
# Kernels take what they need one by one, and a launch takes num_warps besides.

from typing import NamedTuple, cast, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from triton.backends.compiler import GPUTarget

from sae_kernels import blocks
from sae_kernels.blocks import launch


class DecodeMSE(NamedTuple):
    """A reconstruction, its squared error and the gradients of the scaled error."""

    x_hat: Float[Tensor, "batch d_out"]
    row_loss: Float[Tensor, " batch"]
    grad_x_hat: Float[Tensor, "batch d_out"]
    d_values: Float[Tensor, "batch k"]


@triton.jit
@no_type_check
def _entries_of(row, row_ptr, k, CSR: tl.constexpr):
    """Return where the entries of a row start, and how many there are."""
    if CSR:
        start = tl.load(row_ptr + row).to(tl.int64)
        count = (tl.load(row_ptr + row + 1).to(tl.int64) - start).to(tl.int32)
    else:
        start = row * k
        count = k
    return start, count


@triton.jit
@no_type_check
def _gather(table, width, indices, entry, given, column):
    """Load the columns `column` of the rows that the entries name, as float32."""
    index = tl.load(indices + entry, mask=given, other=0).to(tl.int64)
    inside = given[:, None] & (column < width)[None, :]
    return tl.load(table + index[:, None] * width + column[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit(do_not_specialize=["k"])
@no_type_check
def _weighted_rows_kernel(
    values, indices, row_ptr, k, table, width, out,
    CSR: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over its entries of value * table[index]; programs: (row, WIDTH columns)."""
    row = tl.program_id(0).to(tl.int64)
    start, count = _entries_of(row, row_ptr, k, CSR)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, count, ENTRIES):
        slot = first + tl.arange(0, ENTRIES)
        given = slot < count
        weight = tl.load(values + start + slot, mask=given, other=0.0).to(tl.float32)
        rows = _gather(table, width, indices, start + slot, given, column)
        total += tl.sum(weight[:, None] * rows, axis=0)
    tl.store(out + row * width + column, total, mask=column < width)


@triton.jit(do_not_specialize=["k"])
@no_type_check
def _row_products_kernel(
    grad, table, width, indices, row_ptr, k, out,
    CSR: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[entry] = <grad[n], table[index]>; programs: (row, share of its entries)."""
    row = tl.program_id(0).to(tl.int64)
    start, count = _entries_of(row, row_ptr, k, CSR)
    for first in range(tl.program_id(1) * ENTRIES, count, tl.num_programs(1) * ENTRIES):
        slot = first + tl.arange(0, ENTRIES)
        given = slot < count
        total = tl.zeros((ENTRIES, WIDTH), tl.float32)
        for left in range(0, width, WIDTH):
            column = left + tl.arange(0, WIDTH)
            along = tl.load(grad + row * width + column, mask=column < width, other=0.0)
            rows = _gather(table, width, indices, start + slot, given, column)
            total += along.to(tl.float32)[None, :] * rows
        tl.store(out + start + slot, tl.sum(total, axis=1), mask=given)


@triton.jit(do_not_specialize=["k"])
@no_type_check
def _decode_mse_kernel(
    values, indices, k, table, width, bias, target, scale, x_hat, row_loss, grad, d_values,
    BIAS: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Decode, compare and go back, slab by slab of columns; one program a row.

    A slab of all k rows stays in registers between its two uses, so each is read once.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, ENTRIES)
    given = slot < k
    weight = tl.load(values + row * k + slot, mask=given, other=0.0).to(tl.float32)
    products = tl.zeros((ENTRIES,), tl.float32)
    squares = tl.zeros((WIDTH,), tl.float32)
    for left in range(0, width, WIDTH):
        column = left + tl.arange(0, WIDTH)
        inside = column < width
        rows = _gather(table, width, indices, row * k + slot, given, column)
        made = tl.sum(weight[:, None] * rows, axis=0)
        if BIAS:
            made += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        place = row * width + column
        error = made - tl.load(target + place, mask=inside, other=0.0).to(tl.float32)
        slope = 2.0 * scale * error
        squares += error * error
        products += tl.sum(slope[None, :] * rows, axis=1)
        tl.store(x_hat + place, made, mask=inside)
        tl.store(grad + place, slope, mask=inside)
    tl.store(d_values + row * k + slot, products, mask=given)
    tl.store(row_loss + row, tl.sum(squares, axis=0))


def _weighted_rows(
    values: Float[Tensor, "*entries"],
    indices: Int[Tensor, "*entries"],
    row_ptr: Int[Tensor, " end"] | None,
    dec_rows: Float[Tensor, "d_sae d_out"],
    out: Float[Tensor, "batch d_out"],
) -> None:
    batch, width = out.shape
    if not out.numel():
        return
    block = blocks.weighted_rows(width)
    launch(
        _weighted_rows_kernel, (batch, triton.cdiv(width, block.width)), out,
        values, indices, indices if row_ptr is None else row_ptr, indices.shape[-1], dec_rows,
        width, out,
        CSR=row_ptr is not None, ENTRIES=block.entries, WIDTH=block.width,
        num_warps=block.warps,
    )  # fmt: skip


def _row_products(
    grad: Float[Tensor, "batch d_out"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    indices: Int[Tensor, "*entries"],
    row_ptr: Int[Tensor, " end"] | None,
) -> Float[Tensor, "*entries"]:
    out = torch.empty(indices.shape, dtype=torch.float32, device=grad.device)
    if not out.numel():
        return out
    batch, width = grad.shape
    k = indices.shape[-1]
    block = blocks.row_products(width, k)
    splits = triton.cdiv(k, block.entries) if row_ptr is None else blocks.CSR_SPLITS
    launch(
        _row_products_kernel, (batch, splits), out,
        grad, dec_rows, width, indices, indices if row_ptr is None else row_ptr, k, out,
        CSR=row_ptr is not None, ENTRIES=block.entries, WIDTH=block.width,
        num_warps=block.warps,
    )  # fmt: skip
    return out


def weighted_rows(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch d_out"]:
    """Compute `out[n] = sum over i of values[n, i] * dec_rows[indices[n, i]]`.

    Contiguous tensors; the result has the dtype of `dec_rows` where no other is given.
    """
    out = dec_rows.new_empty(len(values), dec_rows.shape[1], dtype=dtype)
    _weighted_rows(values, indices, None, dec_rows, out)
    return out


def row_products(
    grad: Float[Tensor, "batch d_out"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    indices: Int[Tensor, "batch k"],
) -> Float[Tensor, "batch k"]:
    """Compute `out[n, i] = <grad[n], dec_rows[indices[n, i]]>` in float32; contiguous tensors."""
    return _row_products(grad, dec_rows, indices, None)


def csr_weighted_rows(
    values: Float[Tensor, " entry"],
    indices: Int[Tensor, " entry"],
    row_ptr: Int[Tensor, " end"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch d_out"]:
    """Compute `weighted_rows` for entries in compressed sparse rows (batch + 1 pointers)."""
    out = dec_rows.new_empty(len(row_ptr) - 1, dec_rows.shape[1], dtype=dtype)
    _weighted_rows(values, indices, row_ptr, dec_rows, out)
    return out


def csr_row_products(
    grad: Float[Tensor, "batch d_out"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    indices: Int[Tensor, " entry"],
    row_ptr: Int[Tensor, " end"],
) -> Float[Tensor, " entry"]:
    """Compute `row_products` for entries in compressed sparse rows (batch + 1 pointers)."""
    return _row_products(grad, dec_rows, indices, row_ptr)


def _unfused_mse(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"] | None,
    target: Float[Tensor, "batch d_out"],
    scale: float,
    dtype: torch.dtype | None,
) -> DecodeMSE:
    made = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    _weighted_rows(values, indices, None, dec_rows, made)
    made = made if b_dec is None else made + b_dec
    error = made - target
    slope = 2 * scale * error
    products = row_products(slope, dec_rows, indices)
    low = dec_rows.dtype
    return DecodeMSE(made.to(dtype or low), (error * error).sum(1), slope.to(low), products)


def decode_mse(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"] | None,
    target: Float[Tensor, "batch d_out"],
    scale: float,
    dtype: torch.dtype | None = None,
) -> DecodeMSE:
    """Decode and take the gradients of `scale * sum((x_hat - target)^2)` with one gather.

    Contiguous tensors. Up to k = 256 in one kernel, beyond in several.

    Args:
        values: latents (batch, k).
        indices: latents (batch, k).
        dec_rows: one row per latent (d_sae, d_out).
        b_dec: bias (d_out,).
        target: what x_hat should be (batch, d_out).
        scale: of the loss, known beforehand.
        dtype: that of x_hat, where it is not the one of `dec_rows`.

    Returns:
        x_hat and its gradient in the dtype of `dec_rows`; `row_loss = sum((x_hat - target)^2)`,
        without the scale, and the gradient of the values in float32.
    """
    batch, k = values.shape
    width = dec_rows.shape[1]
    if k > blocks.MAX_FUSED_K:
        return _unfused_mse(values, indices, dec_rows, b_dec, target, scale, dtype)
    x_hat = dec_rows.new_empty(batch, width, dtype=dtype)
    grad = dec_rows.new_empty(batch, width)
    row_loss = torch.empty(batch, dtype=torch.float32, device=values.device)
    d_values = torch.empty(batch, k, dtype=torch.float32, device=values.device)
    if batch:
        block = blocks.decode_mse(width, k)
        launch(
            _decode_mse_kernel, (batch,), values,
            values, indices, k, dec_rows, width, dec_rows if b_dec is None else b_dec, target,
            float(scale), x_hat, row_loss, grad, d_values,
            BIAS=b_dec is not None, ENTRIES=block.entries, WIDTH=block.width,
            num_warps=block.warps,
        )  # fmt: skip
    return DecodeMSE(x_hat, row_loss, grad, d_values)


@triton.jit
def _nothing() -> None:
    pass


def interprets() -> bool:
    """Tell whether kernels are interpreted, which is decided when they are defined."""
    return not isinstance(_nothing, triton.JITFunction)


def arch_of(tensor: Shaped[Tensor, "..."]) -> int:
    """Return the compute capability of a tensor's GPU as one number, 90 for 9.0.

    Other tensors get that of the GPU for which kernels are compiled, 80 in the interpreter.
    """
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return 10 * major + minor
    if interprets():
        return 80
    return int(cast(GPUTarget, triton.runtime.driver.active.get_current_target()).arch)
