"""Triton path of `encode_topk`: the product and the selection in chunks of bounded memory.

Where rows are short, a kernel multiplies and takes the maxima of groups while the product is still
in registers, so that the selection reads only the maxima and the members of k groups. Where they
are long, the product is the library's, and the selection reads its result once.
"""

# ruff: noqa: PLR0913
# pyright: reportCallIssue=false
# Kernels take what they need one by one, and a launch takes num_warps besides.

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae_kernels import blocks
from sae_kernels.blocks import launch
from sae_kernels.decode_triton import arch_of, interprets
from sae_kernels.select_triton import FLOATS, order_key, pick, source_of


class Operands(NamedTuple):
    """What is multiplied, `x @ rows.T + bias`: x and rows of one dtype, the bias in float32."""

    x: Float[Tensor, "batch d_in"]
    rows: Float[Tensor, "d_sae d_in"]
    bias: Float[Tensor, " d_sae"]


@triton.jit
@no_type_check
def _dot(x, row, rows, latent, batch, d_sae, width, DEPTH: tl.constexpr, UPCAST: tl.constexpr):
    """Multiply rows of x by rows of the encoder, in float32."""
    depth = tl.arange(0, DEPTH)
    x_at = x + row.to(tl.int64)[:, None] * width + depth[None, :]
    rows_at = rows + latent.to(tl.int64)[None, :] * width + depth[:, None]
    total = tl.zeros((row.shape[0], latent.shape[0]), tl.float32)
    for left in range(0, width, DEPTH):
        inside = depth < width - left
        a = tl.load(x_at + left, mask=(row < batch)[:, None] & inside[None, :], other=0.0)
        b = tl.load(rows_at + left, mask=(latent < d_sae)[None, :] & inside[:, None], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["batch"])
@no_type_check
def _product_kernel(
    x, rows, bias, pre, maxima, batch, d_sae, width, n_groups,
    BITS: tl.constexpr, INFINITY: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store x @ rows.T + bias and the largest key of each group of SIZE latents, tile by tile.

    The tiles of one column of latents run together, so that the encoder is read once.
    """
    n_tiles = tl.cdiv(batch, ROWS)
    row = (tl.program_id(0) % n_tiles) * ROWS + tl.arange(0, ROWS)
    left = (tl.program_id(0) // n_tiles) * LATENTS
    latent = left + tl.arange(0, LATENTS)
    total = _dot(x, row, rows, latent, batch, d_sae, width, DEPTH, UPCAST)
    total += tl.load(bias + latent, mask=latent < d_sae, other=0.0).to(tl.float32)[None, :]

    stored = total.to(pre.dtype.element_ty)
    is_row = (row < batch)[:, None]
    place = row.to(tl.int64)[:, None]
    tl.store(pre + place * d_sae + latent[None, :], stored, mask=is_row & (latent < d_sae)[None, :])
    bits = stored.to(tl.int32 if BITS == 32 else tl.int16, bitcast=True)
    key = order_key(bits, BITS, INFINITY)
    key = tl.where((latent < d_sae)[None, :], key, -(1 << (BITS - 1)))
    largest = tl.max(tl.reshape(key, (ROWS, LATENTS // SIZE, SIZE)), axis=2)
    group = left // SIZE + tl.arange(0, LATENTS // SIZE)
    tl.store(
        maxima + place * n_groups + group[None, :], largest,
        mask=is_row & (group < n_groups)[None, :],
    )  # fmt: skip


def fused_product(
    operands: Operands, pre: Float[Tensor, "batch d_sae"], size: int
) -> Int[Tensor, "batch group"]:
    """Write the pre-activations to `pre` and return the largest key of each group of `size`."""
    x, rows, bias = operands
    (batch, width), d_sae = x.shape, len(rows)
    n_groups = -(-d_sae // size)
    maxima = torch.empty(batch, n_groups, dtype=torch.int32, device=x.device)
    block = blocks.product(arch_of(x))
    bits, infinity = FLOATS[pre.dtype]
    n_tiles = triton.cdiv(batch, block.rows) * triton.cdiv(d_sae, block.latents)
    launch(
        _product_kernel, (n_tiles,), x,
        x, rows, bias, pre, maxima, batch, d_sae, width, n_groups,
        BITS=bits, INFINITY=infinity, SIZE=size,
        ROWS=block.rows, LATENTS=block.latents, DEPTH=block.depth, UPCAST=interprets(),
        num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    return maxima


def _multiply(operands: Operands, out: Float[Tensor, "batch d_sae"]) -> None:
    """Write x @ rows.T, without the bias, to float32."""
    x, rows, _ = operands
    if x.dtype == out.dtype:
        torch.mm(x, rows.T, out=out)
    elif x.is_cuda:
        torch.mm(x, rows.T, out_dtype=out.dtype, out=out)
    else:
        out.copy_(x.float() @ rows.float().T)


def _encode_chunk(
    operands: Operands,
    pre: Float[Tensor, "batch d_sae"],
    k: int,
    relu: bool,
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
) -> None:
    """Encode some rows with `pre` as the workspace."""
    d_sae, width = operands.rows.shape
    if blocks.fuses(d_sae, width, operands.x.itemsize, k):
        size = blocks.group_size(d_sae, k)
        assert size is not None
        maxima = fused_product(operands, pre, size)
        pick(source_of(pre), k, indices, values, maxima, relu)
    else:
        _multiply(operands, pre)
        pick(source_of(pre, operands.bias), k, indices, values, relu=relu)


def encode_topk(
    x_centred: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    relu: bool,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Select the k largest of `x_centred @ enc_rows.T + b_enc` of each row.

    Contiguous tensors; the product is summed, stored and selected from in float32.

    Args:
        x_centred: activations (batch, d_in), in the dtype of `enc_rows`.
        enc_rows: one row per latent (d_sae, d_in).
        b_enc: bias (d_sae,) in float32.
        k: up to 1024 by the kernels, beyond by sorting whole rows.
        relu: clamp the values at 0.

    Returns:
        values in float32, and int64 indices, ascending.
    """
    batch, d_sae = len(x_centred), len(enc_rows)
    options = {"dtype": torch.float32, "device": x_centred.device}
    values = torch.empty(batch, k, **options)
    indices = torch.empty(batch, k, dtype=torch.int64, device=x_centred.device)
    n_rows = blocks.rows_at_a_time(batch, d_sae)
    workspace = torch.empty(n_rows, d_sae, **options)
    for start in range(0, batch, n_rows):
        rows = slice(start, start + n_rows)
        operands = Operands(x_centred[rows], enc_rows, b_enc)
        pre = workspace[: len(operands.x)]
        _encode_chunk(operands, pre, k, relu, values[rows], indices[rows])
    return values, indices
