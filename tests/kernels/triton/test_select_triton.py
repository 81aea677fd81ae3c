"""The selection kernels in Triton's interpreter, against a stable sort."""

import math

import pytest
import torch

from sae_kernels import blocks, select_triton
from sae_kernels.select_triton import TopKRows, group_maxima, pick, source_of, topk_select
from tests.kernels.hard_rows import (
    all_nan,
    denormals,
    distinct,
    equal,
    integers,
    nan_and_inf,
    negative,
    zeros_of_both_signs,
)

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _all_minus_inf(v):
    return torch.full_like(v, -INF)


def _one_group_wins(v):
    """The members of one group of neighbours are the largest of their row."""
    v = v.clone()
    v[:, 512:640] += 100
    return v


def _last_are_largest(v):
    return v.sort().values


CASES = [
    distinct,
    integers,
    equal,
    negative,
    nan_and_inf,
    all_nan,
    _all_minus_inf,
    zeros_of_both_signs,
    denormals,
    _one_group_wins,
    _last_are_largest,
]


def equal_bits(a, b):
    """Equality where NaN equals NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_selects(pre, k, oracle):
    """Compare one order with the oracle, and the values with the input's."""
    best = oracle(pre, k)
    values, indices = topk_select(pre, k, False, False)
    assert indices.dtype == torch.int64
    assert values.dtype == pre.dtype
    assert torch.equal(indices, best.sort(1).values)
    assert equal_bits(values, pre.gather(1, indices))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", CASES, ids=lambda f: f.__name__[1:])
def test_equals_a_stable_sort(make, dtype, normal, oracle):
    pre = make(normal(3, 2311, dtype=torch.float64)).to(dtype)
    assert blocks.group_size(2311, 7) == 16
    assert_selects(pre, 7, oracle)


@pytest.mark.parametrize(
    ("d_sae", "k"), [(1, 1), (23, 23), (67, 1), (547, 61), (2311, 1), (2311, 1024), (1021, 1021)]
)
def test_any_shape(d_sae, k, normal, oracle):
    assert_selects(integers(normal(2, d_sae)), k, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [distinct, integers, nan_and_inf, equal])
def test_levels_of_groups_change_nothing(make, dtype, normal, oracle, monkeypatch):
    monkeypatch.setattr(blocks, "DIRECT_KEYS", 31)
    monkeypatch.setattr(blocks, "MAX_KEYS", 128)
    monkeypatch.setattr(blocks, "MAX_GROUP", 8)
    seen = []
    true = select_triton.group_maxima
    monkeypatch.setattr(
        select_triton, "group_maxima", lambda s, *a: (seen.append(s.rows.shape[1]), true(s, *a))[1]
    )
    assert_selects(make(normal(2, 2311, dtype=torch.float64)).to(dtype), 3, oracle)
    assert seen == [2311, 289]


def test_by_value_and_relu(normal, oracle):
    pre = nan_and_inf(normal(5, 547, dtype=torch.float64)).half()
    pre[3] = integers(pre[3])
    best = oracle(pre, 541)
    values, indices = topk_select(pre, 541, False, True)
    assert torch.equal(indices, best)
    assert equal_bits(values, pre.gather(1, best))
    clamped, same = topk_select(pre, 541, True, True)
    assert torch.equal(same, best)
    assert equal_bits(clamped, pre.gather(1, best).relu())
    clamped, ascending = topk_select(pre, 541, True, False)
    assert (clamped == 0).any()
    assert torch.equal(ascending, best.sort(1).values)
    assert equal_bits(clamped, pre.gather(1, ascending).relu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_maxima_are_the_keys_of_the_largest(dtype, normal):
    pre = nan_and_inf(normal(3, 547, dtype=torch.float64)).to(dtype)
    keys = group_maxima(source_of(pre), 16)
    assert keys.shape == (3, 35)
    padded = torch.cat([pre.float(), torch.full((3, 13), -INF)], 1).view(3, 35, 16)
    largest = padded.amax(2)  # NaN where a member is
    order = torch.sort(largest, dim=1, stable=True, descending=True).indices
    by_key = torch.sort(keys, dim=1, stable=True, descending=True).indices
    assert torch.equal(order, by_key)


def test_picking_keys_takes_the_lower_column_of_equal_ones():
    keys = torch.tensor([[5, -3, 5, 5, 7, 5], [-9, -9, -9, -9, -9, -9]], dtype=torch.int32)
    columns = torch.empty(2, 3, dtype=torch.int32)
    pick(TopKRows(keys, 32, 0), 3, columns)
    assert columns.tolist() == [[0, 2, 4], [0, 1, 2]]


@pytest.mark.parametrize("d_sae", [547, 2311])
def test_a_bias_is_added_on_the_way(d_sae, normal):
    pre, bias = integers(normal(3, d_sae)), 0.5 * integers(normal(d_sae, seed=1))
    right = topk_select(pre + bias, 7, True, False)
    values = torch.empty(3, 7)
    indices = torch.empty(3, 7, dtype=torch.int64)
    pick(source_of(pre, bias), 7, indices, values, relu=True)
    assert torch.equal(indices, right[1])
    assert torch.equal(values, right[0])


def test_runs_repeat_bit_by_bit_on_fresh_memory(normal):
    assert torch.empty(3).isnan().all()  # what a kernel would read where it has not written
    pre = integers(normal(3, 2311))
    first = topk_select(pre, 17, True, False)
    for again in (topk_select(pre, 17, True, False), topk_select(pre, 17, True, False)):
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_no_rows_give_no_rows():
    values, indices = topk_select(torch.zeros(0, 23), 3, True, True)
    assert values.shape == indices.shape == (0, 3)
    assert indices.dtype == torch.int64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_than_a_program_can_hold_is_sorted(dtype, normal, oracle, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_K", 6)
    monkeypatch.setattr(select_triton, "_pick_kernel", None)
    pre = nan_and_inf(integers(normal(3, 547, dtype=torch.float64))).to(dtype)
    assert_selects(pre, 7, oracle)
    clamped = topk_select(pre, 541, True, False)[0]
    assert equal_bits(clamped, pre.gather(1, oracle(pre, 541).sort(1).values).relu())
    assert torch.equal(topk_select(pre, 7, True, True)[1], oracle(pre, 7))


@pytest.mark.parametrize("n", [2049, 8191, 8193, 24576, 65536, 131072, 1 << 20, 1 << 24])
@pytest.mark.parametrize("k", [1, 2, 31, 64, 100, 512, 1024])
def test_every_shape_has_a_plan_that_fits_and_is_exact(n, k):
    size = blocks.group_size(n, k)
    if size is None:
        assert n <= blocks.MAX_KEYS
    else:
        assert size == blocks.next_pow2(size)
        assert k * size <= blocks.picker(k * size).block <= blocks.MAX_KEYS
        assert k <= -(-n // size)  # there are k groups to choose


@pytest.mark.parametrize("n", [4099, 24576, 131072, 1 << 20])
def test_plans_change_with_k_only_by_powers_of_two(n):
    for k in (17, 29, 31):
        assert blocks.group_size(n, k) == blocks.group_size(n, 32)
        size = blocks.group_size(n, 32) or 0
        assert blocks.picker(k * size or n) == blocks.picker(32 * size or n)
