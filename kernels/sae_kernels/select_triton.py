"""Triton kernels of `topk_select`: exact, deterministic, without atomics.

Values are compared as integers of the same order. The row is read once, for the maxima of groups
of G neighbours; the k groups with the largest maxima (ties to the lower group) hold the k largest
values (ties to the lower index), because every group left out has k groups before it that
contribute at least one value each that comes first. Among the maxima the same is done again where
they are many. The k-th largest of the keys in a program's registers is found bit by bit.
"""

# ruff: noqa: PLR0913
# pyright: reportCallIssue=false
# Kernels take what they need one by one, and a launch takes num_warps besides.

import math
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sae_kernels import blocks
from sae_kernels.blocks import launch

FLOATS = {
    torch.float32: (32, 0x7F800000),
    torch.bfloat16: (16, 0x7F80),
    torch.float16: (16, 0x7C00),
}
"""Bits of a pre-activation, and the pattern of its infinity: greater magnitudes are NaN."""


@triton.jit
@no_type_check
def order_key(bits, BITS: tl.constexpr, INFINITY: tl.constexpr):
    """Map the bits of floats to int32 of the same order: -0 equals +0, NaN is the largest."""
    bits = bits.to(tl.int32)
    largest: tl.constexpr = (1 << (BITS - 1)) - 1
    key = tl.where(bits < 0, bits ^ largest, bits)
    key = tl.where(key == -1, 0, key)  # only -0 maps to -1
    return tl.where((bits & largest) > INFINITY, largest, key)


@triton.jit
@no_type_check
def _bits_of(key, BITS: tl.constexpr):
    """Undo `order_key`, but for the sign of zero and the payload of NaN."""
    largest: tl.constexpr = (1 << (BITS - 1)) - 1
    return tl.where(key < 0, key ^ largest, key)


@triton.jit
@no_type_check
def _load_keys(
    source, column, mask, bias,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Load the bits of floats as keys, or keys where INFINITY is 0; what is masked comes last.

    With BIAS the floats are float32 themselves, and are added to the bias of their columns.
    """
    result = tl.load(source + column, mask=mask, other=0)
    if BIAS:
        result += tl.load(bias + column, mask=mask, other=0.0)
        result = result.to(tl.int32, bitcast=True)
    if INFINITY > 0:
        result = order_key(result, BITS, INFINITY)
    return tl.where(mask, result, -(1 << (BITS - 1)))


@triton.jit
@no_type_check
def _group_max_kernel(
    source, n, bias, maxima, n_groups,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BIAS: tl.constexpr,
    SIZE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Store the largest key of each group of SIZE neighbours; programs: (row, GROUPS groups)."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    key = _load_keys(source + row * n, column, column < n, bias, BITS, INFINITY, BIAS)
    tl.store(maxima + row * n_groups + group, tl.max(key, axis=1), mask=group < n_groups)


@triton.jit
@no_type_check
def _kth_largest(key, k, BITS: tl.constexpr):
    """Find the largest t with at least k keys >= t, from its highest bit to its lowest."""
    kth = tl.where(tl.sum((key >= 0).to(tl.int32), axis=0) >= k, 0, -(1 << (BITS - 1)))
    step = tl.full((), 1 << (BITS - 2), tl.int32)
    for _ in range(BITS - 1):
        higher = kth + step
        kth = tl.where(tl.sum((key >= higher).to(tl.int32), axis=0) >= k, higher, kth)
        step = step >> 1
    return kth


@triton.jit(do_not_specialize=["k"])
@no_type_check
def _bound_kernel(maxima, n_groups, n_first, bounds, k, BLOCK: tl.constexpr):
    """Store the k-th largest of the first keys of a row; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK)
    key = tl.load(maxima + row * n_groups + group, mask=group < n_first, other=-(1 << 31))
    tl.store(bounds + row, _kth_largest(key, k, 32))


@triton.jit(do_not_specialize=["k", "relu"])
@no_type_check
def _pick_kernel(
    source, n, bias, groups, values, indices, k, relu,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BIAS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, WITH_VALUES: tl.constexpr,
):  # fmt: skip
    """Store the k largest of a row in the order of their columns; one program a row.

    With SIZE > 0 only the members of the k groups in `groups` (ascending) are looked at.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK)
    if SIZE > 0:
        given = slot < k * SIZE
        column = tl.load(groups + row * k + slot // SIZE, mask=given, other=0) * SIZE + slot % SIZE
        valid = given & (column < n)
    else:
        column = slot
        valid = slot < n
    key = _load_keys(source + row * n, column, valid, bias, BITS, INFINITY, BIAS)
    kth = _kth_largest(key, k, BITS)
    above = key > kth
    tie = key == kth
    wanted = k - tl.sum(above.to(tl.int32), axis=0)  # of the ties
    counts = tl.cumsum(tl.where(above, 1 << 16, 0) + tie.to(tl.int32), axis=0)
    n_ties = counts & 0xFFFF
    position = (counts >> 16) + tl.minimum(n_ties, wanted) - 1
    picked = above | (tie & (n_ties <= wanted))
    tl.store(indices + row * k + position, column, mask=picked)
    if WITH_VALUES:
        shown = tl.where(relu > 0, tl.maximum(key, 0), key)
        tl.store(values + row * k + position, _bits_of(shown, BITS), mask=picked)


class TopKRows(NamedTuple):
    """Rows of which the largest are wanted, in the form that the kernels read."""

    rows: Shaped[Tensor, "batch d_sae"]
    """The bits of floats as integers; float32 where there is a bias; or keys."""
    bits: int
    infinity: int
    """The pattern of infinity, or 0 for keys."""
    bias: Float[Tensor, " d_sae"] | None = None

    def launch(self) -> dict[str, int | bool]:
        """Return what every kernel is told about the rows."""
        return {"BITS": self.bits, "INFINITY": self.infinity, "BIAS": self.bias is not None}


def source_of(
    pre: Float[Tensor, "batch d_sae"], bias: Float[Tensor, " d_sae"] | None = None
) -> TopKRows:
    """Describe contiguous pre-activations, to which a float32 bias may still have to be added."""
    bits, infinity = FLOATS[pre.dtype]
    return TopKRows(pre if bias is not None else _as_integers(pre), bits, infinity, bias)


def _as_integers(floats: Float[Tensor, "batch d_sae"]) -> Int[Tensor, "batch d_sae"]:
    return floats.view(torch.int32 if floats.itemsize == 4 else torch.int16)


def group_maxima(source: TopKRows, size: int) -> Int[Tensor, "batch group"]:
    """Return the largest key of each group of `size` neighbours (a power of two), as int32."""
    batch, n = source.rows.shape
    n_groups = -(-n // size)
    maxima = torch.empty(batch, n_groups, dtype=torch.int32, device=source.rows.device)
    block = blocks.maxima(n_groups, size)
    launch(
        _group_max_kernel, (batch, triton.cdiv(n_groups, block.groups)), maxima,
        source.rows, n, maxima if source.bias is None else source.bias, maxima, n_groups,
        **source.launch(), SIZE=size, GROUPS=block.groups,
        num_warps=block.warps,
    )  # fmt: skip
    return maxima


def kth_of_rows(maxima: Int[Tensor, "batch group"], n_first: int, k: int) -> Int[Tensor, " batch"]:
    """Return the k-th largest of the first keys of each row."""
    bounds = torch.empty(len(maxima), dtype=torch.int32, device=maxima.device)
    block = blocks.picker(n_first)
    launch(
        _bound_kernel, (len(maxima),), maxima,
        maxima, maxima.shape[1], n_first, bounds, k, BLOCK=block.block, num_warps=block.warps,
    )  # fmt: skip
    return bounds


def pick(
    source: TopKRows,
    k: int,
    indices: Int[Tensor, "batch k"],
    values: Float[Tensor, "batch k"] | None = None,
    maxima: Int[Tensor, "batch group"] | None = None,
    relu: bool = False,
) -> None:
    """Write the columns of the k largest of each row, ascending, and their values if wanted.

    Rows are sorted for more than `blocks.MAX_K`, which no program can hold.

    Args:
        source: the rows.
        k: how many.
        indices: where the columns go.
        values: where the values go, in the dtype of the floats.
        maxima: those of groups of `blocks.group_size(d_sae, k)`, where they are known already.
        relu: clamp the values at 0.
    """
    batch, n = source.rows.shape
    if k > blocks.MAX_K and values is not None:
        _sort(source, k, indices, values, relu)
        return
    size = blocks.group_size(n, k) or 0
    groups = indices
    if size:
        maxima = group_maxima(source, size) if maxima is None else maxima
        groups = torch.empty(batch, k, dtype=torch.int32, device=indices.device)
        pick(TopKRows(maxima, source.bits, 0), k, groups)
    block = blocks.picker(k * size or n)
    launch(
        _pick_kernel, (batch,), indices,
        source.rows, n, indices if source.bias is None else source.bias, groups,
        indices if values is None else _as_integers(values), indices, k, int(relu),
        **source.launch(), SIZE=size, BLOCK=block.block, WITH_VALUES=values is not None,
        num_warps=block.warps,
    )  # fmt: skip


def _sort(
    source: TopKRows,
    k: int,
    indices: Int[Tensor, "batch k"],
    values: Float[Tensor, "batch k"],
    relu: bool,
) -> None:
    """Do what `pick` does with a stable sort of the whole rows."""
    floats = source.rows.view(values.dtype) if source.bias is None else source.rows + source.bias
    order = torch.sort(floats + 0.0, dim=1, descending=True, stable=True).indices
    indices.copy_(order[:, :k].sort(dim=1).values)
    result = floats.gather(1, indices.long())
    values.copy_(result.relu() if relu else result)


def topk_select(
    pre: Float[Tensor, "batch d_sae"], k: int, relu: bool, by_value: bool
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Take the k largest of each row: value descending, on equal values index ascending.

    Args:
        pre: contiguous, in float32, bfloat16 or float16.
        k: up to 1024 by the kernels, beyond by sorting whole rows.
        relu: clamp the values at 0.
        by_value: order a row by the rule instead of by index.

    Returns:
        values in the dtype of `pre`, and int64 indices.
    """
    values = torch.empty(len(pre), k, dtype=pre.dtype, device=pre.device)
    indices = torch.empty(len(pre), k, dtype=torch.int64, device=pre.device)
    if not len(pre):
        return values, indices
    pick(source_of(pre), k, indices, values, relu=relu and not by_value)
    if by_value:
        order = torch.sort(values + 0.0, dim=1, descending=True, stable=True).indices
        values, indices = values.gather(1, order), indices.gather(1, order)
        values = values.relu() if relu else values
    return values, indices


def keys_of(floats: Float[Tensor, "*place"]) -> Int[Tensor, "*place"]:
    """Map float32 to int32 of the same order, as the kernels do."""
    bits = floats.view(torch.int32)
    largest = (1 << 31) - 1
    key = torch.where(bits < 0, bits ^ largest, bits)
    return torch.where(key == -1, 0, key).masked_fill(floats.isnan(), largest)


def first_of_largest(keys: Int[Tensor, " entry"], k: int) -> Int[Tensor, " k"]:
    """Name the k largest of all keys, ascending, of equal ones the first, without a wait."""
    kth = keys.topk(k, sorted=False).values.min()
    above, tied = keys > kth, keys == kth
    picked = above | (tied & (tied.cumsum(0, dtype=torch.int32) <= k - above.sum()))
    return picked.nonzero_static(size=k).squeeze(1)


class Members(NamedTuple):
    """The members of some groups of `size` neighbours: their columns, and as floats and keys.

    A member past the end of its row has a key below all others, and its column is the last one.
    """

    columns: Int[Tensor, "group size"]
    floats: Float[Tensor, "group size"]
    keys: Int[Tensor, "group size"]


LEAST = -(1 << 31)
"""A key below that of every float."""


def members_of(
    source: TopKRows, rows: Int[Tensor, " group"], groups: Int[Tensor, " group"], size: int
) -> Members:
    """Look the members of some groups of float32 up."""
    n = source.rows.shape[1]
    column = groups[:, None] * size + torch.arange(size, device=groups.device)
    inside = column.clamp_max(n - 1)
    floats = source.rows.view(torch.float32)[rows[:, None], inside]
    if source.bias is not None:
        floats = floats + source.bias[inside]
    return Members(inside, floats, keys_of(floats).masked_fill(column >= n, LEAST))


def best_of_batch(
    source: TopKRows,
    maxima: Int[Tensor, "batch group"],
    size: int,
    k: int,
    bound: Int[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, " k"], Int[Tensor, " k"]]:
    """Return the k largest of all float32 and, ascending, their places in the flattened rows.

    By the groups' maxima, as in a row: the groups of all rows stand in the order of their places.
    Where fewer than k are not below the bound, -inf takes the place of the others.
    """
    best = first_of_largest(maxima.flatten(), k)
    row, group = best // maxima.shape[1], best % maxima.shape[1]
    columns, floats, keys = members_of(source, row, group, size)
    if bound is not None:
        keys = keys.masked_fill(maxima.flatten()[best, None] < bound, LEAST)
    picked = first_of_largest(keys.flatten(), k)
    values = floats.flatten()[picked].masked_fill(keys.flatten()[picked] == LEAST, -math.inf)
    place = row[:, None] * source.rows.shape[1] + columns
    return values, place.flatten()[picked]
