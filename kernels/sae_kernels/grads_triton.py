"""Triton kernels of the weights' gradients: deterministic, balanced for any skew, no atomics.

The entries are sorted by latent. A program takes 64 sorted entries and multiplies the rows that
they name by `S[e, f] = (latent of e == latent of f) * weight of f`: row e of the product is then
the sum over its latent's run of entries in this block. The last entry of each run stores it. Runs
that cross an edge of the block go to a workspace, and a second kernel adds their parts in order.
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
from sae_kernels.launch import Entries, Segments, WeightGrads


@triton.jit
@no_type_check
def _weighted_segments(latent, weight, rows, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Multiply the rows by the weighted equality matrix of the latents, summing in float32."""
    if UPCAST:
        rows = rows.to(tl.float32)
    same = tl.where(latent[:, None] == latent[None, :], weight[None, :], 0.0)
    return tl.dot(same.to(rows.dtype), rows, input_precision=PRECISION)


@triton.jit(do_not_specialize=["n_entries"])
@no_type_check
def _segments_kernel(
    latents, entries, row_of, n_entries, weights, rows, width, out, edges, squares,
    ENTRIES: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    SQUARES: tl.constexpr,
):  # fmt: skip
    """Sum the runs of a block of entries; programs: (block, share of its columns).

    The parts of the run that comes in from the block before, and of the one that goes on into the
    block after, are stored in `edges` (block, 2, width); the first of them where they are one.
    With SQUARES each program stores the sum of the squares of what it stores in `out`.
    """
    block = tl.program_id(0)
    first = block * ENTRIES
    slot = first + tl.arange(0, ENTRIES)
    given = slot < n_entries
    latent = tl.load(latents + slot, mask=given, other=-1)
    after = tl.load(latents + slot + 1, mask=slot + 1 < n_entries, other=-1)
    before_block = tl.load(latents + first - 1, mask=first > 0, other=-2)
    after_block = tl.load(latents + first + ENTRIES, mask=first + ENTRIES < n_entries, other=-2)
    entry = tl.load(entries + slot, mask=given, other=0)
    weight = tl.load(weights + entry, mask=given, other=0.0).to(tl.float32)
    row = tl.load(row_of + slot, mask=given, other=0).to(tl.int64)

    is_last = (latent != after) | (tl.arange(0, ENTRIES) == ENTRIES - 1)
    is_last = is_last & (latent >= 0)
    comes_in = latent == before_block
    goes_on = latent == after_block
    edge = block.to(tl.int64) * 2 + tl.where(comes_in, 0, 1)
    to_edge = is_last & (comes_in | goes_on)
    to_out = is_last & (latent != before_block) & (latent != after_block)
    destination = latent.to(tl.int64) * width
    square = tl.sum(tl.zeros((WIDTH,), tl.float32), axis=0)
    for left in range(tl.program_id(1) * WIDTH, width, tl.num_programs(1) * WIDTH):
        column = left + tl.arange(0, WIDTH)
        inside = column < width
        result = tl.load(
            rows + row[:, None] * width + column[None, :],
            mask=given[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        total = _weighted_segments(latent, weight, result, PRECISION, UPCAST)
        if SQUARES:
            of_out = tl.where(to_out[:, None], total * total, 0.0)
            # added up in whatever order, which takes the fewest registers; it is the same each time
            square += tl.sum(tl.reshape(of_out, (ENTRIES * WIDTH,), can_reorder=True), axis=0)
        place = column[None, :]
        tl.store(out + destination[:, None] + place, total, mask=to_out[:, None] & inside[None, :])
        tl.store(
            edges + edge[:, None] * width + place, total, mask=to_edge[:, None] & inside[None, :]
        )
    if SQUARES:
        tl.store(squares + block * tl.num_programs(1) + tl.program_id(1), square)


@triton.jit
@no_type_check
def _finish_kernel(
    starts, edges, width, out, squares,
    ENTRIES: tl.constexpr, WIDTH: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """Clear the row of a latent without entries; add up one whose run lies in several blocks.

    With SQUARES each program stores the sum of the squares of what it added up.
    """
    latent = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + latent)
    stop = tl.load(starts + latent + 1)
    first = start // ENTRIES
    last = (stop - 1) // ENTRIES
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    square = tl.sum(tl.zeros((WIDTH,), tl.float32), axis=0)
    if start == stop:
        tl.store(out + latent * width + column, tl.zeros((WIDTH,), tl.float32), mask=inside)
    elif first < last:
        total = tl.load(edges + (2 * first + 1) * width + column, mask=inside, other=0.0)
        for block in range(first + 1, last + 1):
            total += tl.load(edges + 2 * block * width + column, mask=inside, other=0.0)
        tl.store(out + latent * width + column, total, mask=inside)
        square = tl.sum(total * total, axis=0)
    if SQUARES:
        tl.store(squares + latent * tl.num_programs(1) + tl.program_id(1), square)


@triton.jit
@no_type_check
def _sums_kernel(starts, entries, values, d_values, sums, fired, BLOCK: tl.constexpr):
    """sums[j] = sum of d_values and fired[j] = number of values != 0, over the entries of j."""
    latent = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + latent)
    stop = tl.load(starts + latent + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(start, stop, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        given = slot < stop
        entry = tl.load(entries + slot, mask=given, other=0)
        total += tl.load(d_values + entry, mask=given, other=0.0).to(tl.float32)
        value = tl.load(values + entry, mask=given, other=0.0).to(tl.float32)
        count += (value != 0).to(tl.int32)
    tl.store(sums + latent, tl.sum(total, axis=0))
    tl.store(fired + latent, tl.sum(count, axis=0))


def segment_product(
    parts: Segments, weights: Float[Tensor, " entry"], rows: Float[Tensor, "batch d_out"]
) -> Float[Tensor, "d_sae d_out"]:
    """Compute `out[j] = sum of weights[e] * rows[row of e]` over the entries of latent j.

    In float32, from contiguous tensors; weights are rounded to bfloat16 where the rows are.
    """
    return _product(parts, weights, rows, False)[0]


def product_and_square(
    parts: Segments, weights: Float[Tensor, " entry"], rows: Float[Tensor, "batch d_out"]
) -> tuple[Float[Tensor, "d_sae d_out"], Float[Tensor, ""]]:
    """Do the same, and sum the squares of the result while it is in the registers."""
    out, squares = _product(parts, weights, rows, True)
    return out, squares[0].sum() + squares[1].sum()


def _product(
    parts: Segments, weights: Float[Tensor, " entry"], rows: Float[Tensor, "batch d_out"], has: bool
) -> tuple[Tensor, list[Tensor]]:
    """The product and, if it has them, the sums of squares of each program of both kernels."""
    n_entries, width, d_sae = len(parts.latents), rows.shape[1], len(parts.lengths)
    options = {"dtype": torch.float32, "device": rows.device}
    if not n_entries or not width:
        return torch.zeros(d_sae, width, **options), [torch.zeros(1, **options)] * 2
    out = torch.empty(d_sae, width, **options)
    # float16 would lose small weights; bfloat16 keeps their range
    as_is = rows.dtype == torch.bfloat16 and not interprets()
    block = blocks.segments(n_entries, width, 2 if as_is else 4, arch_of(rows))
    n_blocks = -(-n_entries // block.entries)
    edges = torch.empty(n_blocks, 2, width, **options)
    slab = min(blocks.FINISH_WIDTH, blocks.next_pow2(width))
    grids = (n_blocks, block.splits), (d_sae, -(-width // slab))
    squares = [torch.empty(grid, **options) if has else out for grid in grids]
    launch(
        _segments_kernel, grids[0], out,
        parts.latents, parts.entries, parts.rows, n_entries, weights, rows, width, out, edges,
        squares[0],
        ENTRIES=block.entries, WIDTH=block.width, PRECISION="tf32x3", UPCAST=not as_is,
        SQUARES=has, num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    launch(
        _finish_kernel, grids[1], out,
        _bounds(parts), edges, width, out, squares[1],
        ENTRIES=block.entries, WIDTH=slab, SQUARES=has, num_warps=4,
    )  # fmt: skip
    return out, squares


class SegmentSums(NamedTuple):
    """Of each latent the sum of the gradients of its values, and how often it fired."""

    b_enc: Float[Tensor, " d_sae"]
    n_fired: Int[Tensor, " d_sae"]


def segment_sums(
    parts: Segments, values: Float[Tensor, " entry"], d_values: Float[Tensor, " entry"]
) -> SegmentSums:
    """Add `d_values` up and count `values != 0` over the entries of each latent."""
    d_sae = len(parts.lengths)
    b_enc = torch.empty(d_sae, dtype=torch.float32, device=values.device)
    n_fired = torch.empty(d_sae, dtype=torch.int64, device=values.device)
    if d_sae:
        launch(
            _sums_kernel, (d_sae,), b_enc,
            _bounds(parts), parts.entries, values, d_values, b_enc, n_fired,
            BLOCK=blocks.SUM_ENTRIES, num_warps=1,
        )  # fmt: skip
    return SegmentSums(b_enc, n_fired)


def _bounds(parts: Segments) -> Int[Tensor, " end"]:
    """Where the run of each latent starts, and where the last one ends."""
    return torch.nn.functional.pad(parts.lengths.cumsum(0), (1, 0))


def weight_grads(
    values: Float[Tensor, "batch k"],
    d_values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    grad_out: Float[Tensor, "batch d_out"],
    x: Float[Tensor, "batch d_in"],
    d_sae: int,
) -> WeightGrads:
    """Compute all gradients of `sparse_weight_grads` from one sort, in float32.

    Contiguous tensors. Weights are rounded to bfloat16 where the rows are bfloat16.
    """
    parts = Entries(indices, d_sae).segments
    values, d_values = values.flatten(), d_values.flatten()
    dec_rows = segment_product(parts, values, grad_out)
    sums = segment_sums(parts, values, d_values)
    return WeightGrads(dec_rows, segment_product(parts, d_values, x), *sums)
