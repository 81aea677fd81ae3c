"""Triton path of the encoders: the product and the selection in chunks of bounded memory.

The product is the library's, and the selection reads its result once, for the maxima of groups of
neighbours; then it looks at the members of the best groups alone. Or, where `blocks.gates` says so,
a kernel of our own multiplies and takes the maxima while the product is in registers, and the gate
stores only what can be looked at: the groups of the first latents, and of the others those whose
maximum is not below a bound. For the k largest of a row (or of the batch) the bound is the k-th
largest maximum of the first groups: k values are at least as large, so whatever is below it is not
among the k largest. For thresholds it is the smallest one of the group. So the gate changes no
result, whatever it is given, ties and NaN included; nothing is added up in an order that varies.
"""

# ruff: noqa: PLR0913
# pyright: reportCallIssue=false
# Kernels take what they need one by one, and a launch takes num_warps besides.

from collections.abc import Callable, Iterator
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae_kernels import blocks
from sae_kernels.blocks import launch
from sae_kernels.decode_triton import arch_of, interprets
from sae_kernels.select_triton import (
    FLOATS,
    LEAST,
    TopKRows,
    best_of_batch,
    first_of_largest,
    group_maxima,
    keys_of,
    kth_of_rows,
    members_of,
    order_key,
    pick,
    source_of,
)


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
    x, rows, bias, pre, maxima, bounds, row_stride, group_stride,
    batch, d_sae, first, end, width, n_groups,
    GATED: tl.constexpr, INFINITY: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Multiply by the latents from `first` to `end`, tile by tile; keep what is let through.

    The largest key of each group of SIZE latents is stored, and x @ rows.T + bias too; where the
    product is GATED that alone of the groups whose key is not below their bound. The tiles of one
    column of latents run together, so that the encoder is read once.
    """
    n_tiles = tl.cdiv(batch, ROWS)
    row = (tl.program_id(0) % n_tiles) * ROWS + tl.arange(0, ROWS)
    left = first + (tl.program_id(0) // n_tiles) * LATENTS
    latent = left + tl.arange(0, LATENTS)
    total = _dot(x, row, rows, latent, batch, end, width, DEPTH, UPCAST)
    total += tl.load(bias + latent, mask=latent < end, other=0.0).to(tl.float32)[None, :]

    group = left // SIZE + tl.arange(0, LATENTS // SIZE)
    member = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.reshape(total, (ROWS, LATENTS // SIZE, SIZE))
    key = order_key(total.to(tl.int32, bitcast=True), 32, INFINITY)
    key = tl.where((member < end)[None, :, :], key, -(1 << 31))
    largest = tl.max(key, axis=2)
    place = row.to(tl.int64)
    is_group = (row < batch)[:, None] & (group * SIZE < end)[None, :]
    tl.store(maxima + place[:, None] * n_groups + group[None, :], largest, mask=is_group)
    if GATED:
        at = place[:, None] * row_stride + group[None, :] * group_stride
        is_group = is_group & (largest >= tl.load(bounds + at, mask=is_group, other=0))
    tl.store(
        pre + place[:, None, None] * d_sae + member[None, :, :], total,
        mask=is_group[:, :, None] & (member < end)[None, :, :],
    )  # fmt: skip


class Gate(NamedTuple):
    """Which groups of `size` latents are stored: the first, and what the bound lets through."""

    size: int
    n_first: int
    """Latents stored whole, a multiple of the size; 0 where the bound is known beforehand."""
    bound: Callable[[Int[Tensor, "row group"]], Int[Tensor, "..."]]
    """Keys that let a group through, made when the first of the maxima are there: one for all,
    (row, 1) or (group,)."""


def _store(
    operands: Operands,
    pre: Float[Tensor, "batch d_sae"],
    maxima: Int[Tensor, "batch group"],
    size: int,
    latents: tuple[int, int],
    bounds: Int[Tensor, "batch group"] | None,
) -> None:
    """Multiply by the latents from the first number to the second, the first of a group."""
    x, rows, bias = operands
    (batch, width), (first, end) = x.shape, latents
    block = blocks.product(arch_of(x))
    n_tiles = triton.cdiv(batch, block.rows) * triton.cdiv(end - first, block.latents)
    strides = (0, 0) if bounds is None else bounds.stride()
    launch(
        _product_kernel, (n_tiles,), x,
        x, rows, bias, pre, maxima, maxima if bounds is None else bounds, *strides,
        batch, len(rows), first, end, width, maxima.shape[1],
        GATED=bounds is not None, INFINITY=FLOATS[torch.float32][1], SIZE=size,
        ROWS=block.rows, LATENTS=block.latents, DEPTH=block.depth, UPCAST=interprets(),
        num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip


def gated_product(
    operands: Operands, pre: Float[Tensor, "batch d_sae"], gate: Gate
) -> Int[Tensor, "batch group"]:
    """Write the pre-activations that the gate lets through to `pre`; return all groups' maxima."""
    n_groups = -(-pre.shape[1] // gate.size)
    maxima = torch.empty(len(pre), n_groups, dtype=torch.int32, device=pre.device)
    if gate.n_first:
        _store(operands, pre, maxima, gate.size, (0, gate.n_first), None)
    bounds = gate.bound(maxima).expand(maxima.shape)
    _store(operands, pre, maxima, gate.size, (gate.n_first, pre.shape[1]), bounds)
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


def _chunks(operands: Operands) -> Iterator[tuple[slice, Operands, Float[Tensor, "row d_sae"]]]:
    """Go through the batch some rows at a time, always with the same workspace."""
    batch, d_sae = len(operands.x), len(operands.rows)
    n_rows = blocks.rows_at_a_time(batch, d_sae)
    workspace = torch.empty(n_rows, d_sae, dtype=torch.float32, device=operands.x.device)
    for start in range(0, batch, n_rows):
        rows = slice(start, min(start + n_rows, batch))
        yield rows, operands._replace(x=operands.x[rows]), workspace[: rows.stop - start]


def _encoded(
    operands: Operands, pre: Float[Tensor, "batch d_sae"], size: int, gate: Gate | None
) -> tuple[TopKRows, Int[Tensor, "batch group"]]:
    """Return the pre-activations of some rows, and the largest key of each group of `size`."""
    if gate is not None:
        return source_of(pre), gated_product(operands, pre, gate)
    _multiply(operands, pre)
    source = source_of(pre, operands.bias)
    return source, group_maxima(source, size)


def row_gate(d_sae: int, k: int) -> Gate | None:
    """Gate what the k largest of a row are looked for in; None where too few latents come first."""
    size = blocks.group_size(d_sae, k)
    n_first = 0 if size is None else blocks.first_latents(d_sae, size, k)
    if size is None or not n_first:
        return None
    return Gate(size, n_first, lambda maxima: kth_of_rows(maxima, n_first // size, k)[:, None])


def _gates(operands: Operands, gated: bool | None) -> bool:
    """Tell whether the product is gated, where it can be and nobody forces it."""
    x = operands.x
    return blocks.gates(x.shape[1], x.itemsize) if gated is None else gated


def encode_topk(
    x_centred: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    relu: bool,
    gated: bool | None = None,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Select the k largest of `x_centred @ enc_rows.T + b_enc` of each row.

    Contiguous tensors; the product is summed, stored and selected from in float32.

    Args:
        x_centred: activations (batch, d_in), in the dtype of `enc_rows`.
        enc_rows: one row per latent (d_sae, d_in).
        b_enc: bias (d_sae,) in float32.
        k: up to 1024 by the kernels, beyond by sorting whole rows.
        relu: clamp the values at 0.
        gated: the gated product, or the library's; by default what `blocks.gates` says. Where the
            first latents are too few for a bound, it is the library's.

    Returns:
        values in float32, and int64 indices, ascending.
    """
    operands, batch = Operands(x_centred, enc_rows, b_enc), len(x_centred)
    values = torch.empty(batch, k, dtype=torch.float32, device=x_centred.device)
    indices = torch.empty(batch, k, dtype=torch.int64, device=x_centred.device)
    gate = row_gate(len(enc_rows), k) if _gates(operands, gated) else None
    for rows, some, pre in _chunks(operands):
        if gate is not None:
            maxima = gated_product(some, pre, gate)
            pick(source_of(pre), k, indices[rows], values[rows], maxima, relu)
        else:
            _multiply(some, pre)
            pick(source_of(pre, b_enc), k, indices[rows], values[rows], relu=relu)
    return values, indices


def _batch_gate(pre: Float[Tensor, "row d_sae"], size: int, k: int) -> Gate | None:
    """Gate what the k largest of all rows are looked for in; None where too few come first."""
    n_first = blocks.first_latents(pre.shape[1], size, k / len(pre))

    def bound(maxima: Int[Tensor, "row group"]) -> Int[Tensor, ""]:
        return maxima[:, : n_first // size].flatten().topk(k, sorted=False).values.min()

    return Gate(size, n_first, bound) if n_first else None


def encode_batch_topk(
    operands: Operands, k: int, gated: bool | None = None
) -> tuple[Float[Tensor, " entry"], Int[Tensor, " entry"]]:
    """Return the k largest of all pre-activations and their places, ascending, without a wait.

    The best so far are kept; of a later chunk only what is above the worst of them can come in.
    """
    may_gate, d_sae = _gates(operands, gated), len(operands.rows)
    values = operands.bias[:0]
    places = torch.zeros(0, dtype=torch.int64, device=values.device)
    worst: Int[Tensor, ""] | None = None
    for rows, some, pre in _chunks(operands):
        n_wanted = min(k, pre.numel())
        size = blocks.batch_group_size(pre.numel(), n_wanted)
        bound = worst if may_gate and size > 1 else None
        if bound is not None:
            gate = Gate(size, 0, lambda _, bound=bound: bound)
        else:
            gate = _batch_gate(pre, size, n_wanted) if may_gate and size > 1 else None
        best, at = best_of_batch(*_encoded(some, pre, size, gate), size, n_wanted, bound)
        values, places = torch.cat([values, best]), torch.cat([places, at + rows.start * d_sae])
        if len(values) > k:
            kept = first_of_largest(keys_of(values), k)
            values, places = values[kept], places[kept]
        if len(values) == k:
            worst = keys_of(values).min()
    return values, places


THRESHOLD_GROUP = 64
"""Neighbours of which one is compared first: about as many as lie between two that pass."""


def encode_threshold(
    operands: Operands, threshold: Float[Tensor, "*d_sae"], gated: bool | None = None
) -> tuple[Float[Tensor, " entry"], Int[Tensor, " entry"]]:
    """Return what is above its threshold, or NaN, and its places in the batch, ascending."""
    d_sae, size = len(operands.rows), THRESHOLD_GROUP
    limits = threshold.expand(d_sae)
    keys = keys_of(limits.contiguous()).masked_fill(limits.isnan(), LEAST)  # which all pass
    keys = torch.nn.functional.pad(keys, (0, -d_sae % size), value=(1 << 31) - 1)
    least = keys.unflatten(0, (-1, size)).amin(1)
    gate = Gate(size, 0, lambda _: least) if _gates(operands, gated) else None
    values = [operands.bias[:0]]
    places = [torch.zeros(0, dtype=torch.int64, device=least.device)]
    for rows, some, pre in _chunks(operands):
        source, maxima = _encoded(some, pre, size, gate)
        row, group = (maxima >= least).nonzero(as_tuple=True)
        columns, floats, found = members_of(source, row, group, size)
        passes = (~(floats <= limits[columns]) & (found != LEAST)).flatten().nonzero().squeeze(1)
        values.append(floats.flatten()[passes])
        place = (row + rows.start)[:, None] * d_sae + columns
        places.append(place.flatten()[passes])
    return torch.cat(values), torch.cat(places)
