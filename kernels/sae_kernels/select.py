"""Exact top-k of each row, with one rule for ties: value descending, index ascending.

The torch path reads the row once. It takes the maxima of strided groups of latents, keeps the k
groups with the largest maxima (recursively) and then looks only at their members. That set is the
top k whenever its smallest member is strictly above everything that was left out, because each of
the k groups contributes at least one member that is not below any latent of the other groups.
Rows where it is not (ties at the boundary, and some rows with NaN) are settled by index.

As `torch.compile` sees it the op is opaque, with shapes for its tracing and with a gradient. The
operator calls the public function, which checks the arguments when the compiled code runs; its
annotations are bare tensors, because torch reads the operator's schema from them.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_kernels.launch import check_floating, check_k, check_shape, choose, workspace

GROUP = 8  # latents a group: the fewest passes over (row, latent) pairs on an AVX-512 CPU
CHUNK = 1 << 21  # pre-activations selected at a time, so that the passes meet them in the cache
COLUMN_BITS = 29  # what float64 has beyond the 23 mantissa bits of float32
HEAP_RATIO = 64  # torch.topk keeps a heap, and is fast, where a row is this many times k


class TopKResult(NamedTuple):
    """The k largest pre-activations of each row, and the latents that they belong to."""

    values: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]


def topk_select_reference(
    pre: Float[Tensor, "batch d_sae"], k: int, *, relu: bool = True, sorted: bool = False
) -> TopKResult:
    """Take the first k of a stable descending sort; + 0.0 for sorts that tell -0 from +0."""
    order = torch.sort(pre.detach() + 0.0, dim=1, descending=True, stable=True).indices
    indices = order[:, :k]
    if not sorted:
        indices = indices.sort(dim=1).values
    values = pre.gather(1, indices)
    return TopKResult(values.relu() if relu else values, indices)


class _Pick(NamedTuple):
    """The winners of each row, and the largest value left out; NaN may be given as +inf."""

    indices: Int[Tensor, "batch k"]
    smallest: Float[Tensor, " batch"]
    left_out: Float[Tensor, " batch"]


def _pick_by_key(v: Float[Tensor, "batch d_sae"], k: int) -> _Pick:
    """Partition float64 keys that hold the value (up to float32) and, below it, the column."""
    n = v.shape[1]
    # inf would turn into NaN with a column in its mantissa; NaN must stay the largest
    keys = v.double().nan_to_num_(nan=2.0**1001, posinf=2.0**1000, neginf=-(2.0**1000))
    bits = keys.view(torch.int64)
    bits |= torch.arange(n)
    rows = keys.numpy()
    if n <= 256:  # numpy sorts rows this short in registers
        rows.sort(axis=1)
    else:
        rows.partition(n - k - 1, axis=1)
    columns = bits[:, n - k :] & ((1 << COLUMN_BITS) - 1)
    # rounding to the dtype of v takes the column off again
    return _Pick(columns, keys[:, n - k :].amin(1).to(v.dtype), keys[:, n - k - 1].to(v.dtype))


def _pick_directly(v: Float[Tensor, "batch d_sae"], k: int) -> _Pick:
    """Take k < n of each row, in no order; equal values in no order either."""
    n = v.shape[1]
    fits = v.dtype != torch.float64 and n <= 1 << COLUMN_BITS
    if v.device.type == "cpu" and fits and n <= HEAP_RATIO * k:
        return _pick_by_key(v, k)
    values, indices = v.topk(k + 1, dim=1)
    return _Pick(indices[:, :k], values[:, k - 1], values[:, k])


def _pick(v: Float[Tensor, "batch d_sae"], k: int) -> _Pick:
    """Take k < n of each row by way of its groups, where there are enough of them to pay."""
    n = v.shape[1]
    size = math.gcd(n, GROUP)
    if size == 1 or 2 * size * k > n:
        return _pick_directly(v, k)
    n_groups = n // size
    groups = v.unflatten(1, (size, n_groups))  # (batch, size, n_groups); members are n_groups apart
    best_groups = _pick(groups.amax(1), k)
    members = groups.gather(
        2, best_groups.indices[:, None, :].expand(-1, size, -1)
    )  # (batch, size, k)
    best = _pick_directly(members.flatten(1), k)
    indices = best_groups.indices.gather(1, best.indices % k) + best.indices // k * n_groups
    return _Pick(indices, best.smallest, torch.maximum(best.left_out, best_groups.left_out))


def _settle(
    v: Float[Tensor, "batch d_sae"], picked: Int[Tensor, "batch k"], k: int
) -> Int[Tensor, "batch k"]:
    """Replace the tied members of `picked` by those of the lowest index.

    `picked` has the right values, so the smallest of them is the k-th largest of the row. Only
    groups whose maximum reaches it are looked at. NaN counts as above every number.
    """
    batch, d_sae = v.shape
    size = math.gcd(d_sae, GROUP)
    kth = v.gather(1, picked).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).amin(1)
    groups = v.unflatten(1, (size, -1))
    row, group = (~(groups.amax(1) < kth[:, None])).nonzero(as_tuple=True)
    members = torch.arange(0, d_sae, d_sae // size, device=v.device)
    flat = (row * d_sae + group)[:, None] + members  # positions in v, read row after row
    flat = flat[~(v.take(flat) < kth[row][:, None])].sort().values
    row = flat // d_sae
    above = ~(v.take(flat) <= kth[row])
    n_above = torch.zeros_like(kth, dtype=torch.int64).index_add_(0, row, above.long())
    n_found = torch.bincount(row, minlength=batch)
    before = n_found.cumsum(0) - n_found  # entries of earlier rows
    above_before = n_above.cumsum(0) - n_above
    rank_above = above.cumsum(0) - above.long() - above_before[row]
    rank = torch.arange(len(flat), device=v.device) - before[row]
    rank = torch.where(above, rank_above, rank - rank_above + n_above[row])
    return (flat % d_sae)[rank < k].view(batch, k)


def _uncertain(pick: _Pick) -> Bool[Tensor, " batch"]:
    """Tell the rows whose winners are not strictly above all that was left out, or hold NaN."""
    return ~(pick.smallest > pick.left_out)


def _select(v: Float[Tensor, "batch d_sae"], k: int) -> Int[Tensor, "batch k"]:
    """Return the winners of each row, in ascending order."""
    if k == v.shape[1]:
        return torch.arange(k, device=v.device).expand(len(v), k).contiguous()
    pick = _pick(v, k)
    rows = _uncertain(pick).nonzero().flatten()
    if rows.numel():
        pick.indices[rows] = _settle(v[rows], pick.indices[rows], k)
    return pick.indices.sort(dim=1).values


def _topk_select_torch(
    pre: Float[Tensor, "batch d_sae"], k: int, relu: bool, by_value: bool
) -> TopKResult:
    batch, d_sae = pre.shape
    n_rows = max(1, workspace(pre.device, 4 * CHUNK) // (4 * d_sae))
    indices = torch.empty(batch, k, dtype=torch.int64, device=pre.device)
    for start in range(0, batch, n_rows):
        rows = slice(start, start + n_rows)
        indices[rows] = _select(pre.detach()[rows], k)
    values = pre.gather(1, indices)
    if by_value:
        order = torch.sort(values.detach() + 0.0, dim=1, descending=True, stable=True).indices
        values, indices = values.gather(1, order), indices.gather(1, order)
    return TopKResult(values.relu() if relu else values, indices)


def _topk_select_triton(
    pre: Float[Tensor, "batch d_sae"], k: int, relu: bool, by_value: bool
) -> TopKResult:
    from sae_kernels import select_triton

    values, indices = select_triton.topk_select(pre.detach().contiguous(), k, relu, by_value)
    if pre.requires_grad and torch.is_grad_enabled():  # the same values again, by way of `pre`
        values = pre.gather(1, indices)
        values = values.relu() if relu else values
    return TopKResult(values, indices)


def topk_select(
    pre: Float[Tensor, "batch d_sae"],
    k: int,
    *,
    relu: bool = True,
    sorted: bool = False,
    backend: str | None = None,
) -> TopKResult:
    """Take the k largest of each row: value descending, on equal values index ascending.

    -0 equals +0; NaN is larger than every number. The values carry a gradient to `pre`, the
    indices none.

    Args:
        pre: pre-activations (batch, d_sae) of any floating dtype.
        k: how many, 1 <= k <= d_sae.
        relu: clamp the returned values at 0 (NaN stays NaN); the indices are the same.
        sorted: return each row by the rule above instead of by ascending latent index.
        backend: a forced backend; the fastest one by default.

    Returns:
        values (batch, k) in the dtype of `pre`, and int64 indices (batch, k).

    Raises:
        ValueError: if `pre` is not two-dimensional, or k or the backend are out of range.
        TypeError: if `pre` is not floating point.
    """
    if torch.compiler.is_compiling():
        return _compiled_select(pre, k, relu, sorted, backend)
    check_shape("pre", pre, None, None)
    check_floating(pre=pre)
    check_k(k, pre.shape[1])
    name = choose(pre, backend)
    if name == "reference":
        return topk_select_reference(pre, k, relu=relu, sorted=sorted)
    if name == "triton":
        return _topk_select_triton(pre, k, relu, sorted)
    return _topk_select_torch(pre, k, relu, sorted)


@torch.library.custom_op("sae_kernels::select", mutates_args=())
def _select_op(pre: Tensor, k: int, by_value: bool, backend: str | None) -> Tensor:
    return topk_select(pre, k, relu=False, sorted=by_value, backend=backend).indices


@_select_op.register_fake
def _(pre: Tensor, k: int, *_: Any) -> Tensor:
    return pre.new_empty(pre.shape[0], k, dtype=torch.int64)


def _compiled_select(
    pre: Tensor, k: int, relu: bool, by_value: bool, backend: str | None
) -> TopKResult:
    """Select by an operator, and gather the values, which has a gradient."""
    indices = _select_op(pre.detach(), k, by_value, backend)
    values = pre.gather(1, indices)
    return TopKResult(values.relu() if relu else values, indices)
