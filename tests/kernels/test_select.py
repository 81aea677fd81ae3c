import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from sae_kernels import TopKResult, select, topk_select
from sae_kernels.select import topk_select_reference
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
BACKENDS = ["reference", "torch"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# A prime has no groups; the others have one, two and three levels of groups for small k.
WIDTHS = [23, 547, 8 * 67, 8 * 8 * 13, 8 * 8 * 8 * 5]


def _one_group_wins(v):
    """The members of strided group 3 at the outermost level are the largest of their row."""
    v = v.clone()
    v[:, 3 :: max(1, v.shape[1] // 8)] += 100
    return v


def _first_are_largest(v):
    return v.sort(descending=True).values


def _equal_in_neighbours(v):
    return v[:, torch.arange(v.shape[1]) // 8]


def _equal_across_groups(v):
    return (torch.arange(v.shape[1]) % (v.shape[1] // 8)).to(v.dtype).expand_as(v)


CASES = [
    distinct,
    integers,
    equal,
    negative,
    nan_and_inf,
    all_nan,
    zeros_of_both_signs,
    denormals,
    _one_group_wins,
    _first_are_largest,
    _equal_in_neighbours,
    _equal_across_groups,
]


def assert_selects(pre, k, oracle):
    """Compare both orders, and values with NaN, with the oracle."""
    best = oracle(pre, k)
    for backend in BACKENDS:
        by_value = topk_select(pre, k, relu=False, sorted=True, backend=backend)
        assert torch.equal(by_value.indices, best)
        by_index = topk_select(pre, k, relu=False, backend=backend)
        assert torch.equal(by_index.indices, best.sort(1).values)
        for result in (by_value, by_index):
            expected = pre.gather(1, result.indices)
            assert result.values.dtype == pre.dtype
            assert torch.equal(result.values.isnan(), expected.isnan())
            assert torch.equal(result.values.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answer(backend):
    pre = torch.tensor([[3.0, 1.0, 3.0, 2.0, 3.0], [-2.0, -1.0, -3.0, 0.5, -1.0]])
    values, indices = topk_select(pre, 2, backend=backend)
    assert indices.tolist() == [[0, 2], [1, 3]]
    assert values.tolist() == [[3.0, 3.0], [0.0, 0.5]]
    values, indices = topk_select(pre, 3, relu=False, sorted=True, backend=backend)
    assert indices.tolist() == [[0, 2, 4], [3, 1, 4]]
    assert values.tolist() == [[3.0, 3.0, 3.0], [0.5, -1.0, -1.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", CASES, ids=lambda f: f.__name__[1:])
def test_equals_a_stable_sort(make, dtype, normal, oracle):
    for d_sae in WIDTHS:
        pre = make(normal(5, d_sae, dtype=torch.float64)).to(dtype)
        for k in (1, 3, 19):
            assert_selects(pre, k, oracle)


@pytest.mark.parametrize("d_sae", WIDTHS)
def test_any_k_up_to_the_width(d_sae, normal, oracle):
    pre = integers(normal(3, d_sae))
    for k in {d_sae // 32 + 1, d_sae // 8, d_sae // 3, d_sae // 2 + 1, d_sae - 1, d_sae}:
        assert_selects(pre, k, oracle)


@given(
    st.lists(
        st.lists(
            st.sampled_from([-3, -1, -0.0, 0.0, 1, 2, INF, -INF, NAN]), min_size=64, max_size=64
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 64),
    st.sampled_from(DTYPES),
)
def test_heavy_ties_equal_a_stable_sort(oracle, rows, k, dtype):
    assert_selects(torch.tensor(rows, dtype=dtype), k, oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_number_inf_and_nan_are_three(dtype, normal, oracle):
    for width in (23, 104):
        pre = normal(7, width, dtype=torch.float64).to(dtype)
        pre[:, [2, 11]] = torch.finfo(dtype).max
        pre[:, [3, 5]] = INF
        pre[:, 7] = NAN
        pre[:, [13, 17]] = -INF
        pre[:, 19] = torch.finfo(dtype).min
        for k in (1, 2, 3, 4, 5, width - 3, width - 2, width - 1):
            assert_selects(pre, k, oracle)


def test_every_way_through_the_fast_path_is_taken(normal, monkeypatch):
    calls = []
    for name in ("_pick_by_key", "_pick_directly", "_pick", "_settle"):
        true = getattr(select, name)
        monkeypatch.setattr(
            select, name, lambda *args, true=true, name=name: (calls.append(name), true(*args))[1]
        )
    topk_select(normal(5, 8 * 8 * 13), 3)  # 832 latents, 104 groups, 13 groups of groups
    picks = ["_pick_directly", "_pick_by_key"]
    assert calls == ["_pick", "_pick", "_pick", *picks, *picks, *picks]
    calls.clear()
    topk_select(normal(5, 547), 3)
    assert calls == ["_pick", "_pick_directly"]  # torch.topk: few of many
    calls.clear()
    topk_select(torch.ones(5, 547), 19)
    assert calls == ["_pick", "_pick_directly", "_pick_by_key", "_settle"]


def test_relu_clamps_the_values_and_keeps_the_indices_and_nan(normal):
    pre = normal(5, 67)
    pre[2, 3] = NAN
    plain, clamped = topk_select(pre, 61, relu=False), topk_select(pre, 61)
    assert torch.equal(plain.indices, clamped.indices)
    assert (plain.values < 0).any()
    assert torch.equal(clamped.values.isnan(), plain.values.isnan())
    assert clamped.values.isnan().sum() == 1
    assert torch.equal(clamped.values.nan_to_num(), plain.values.nan_to_num().clamp_min(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_select_like_their_copies(backend, normal):
    base = integers(normal(1072, 7))
    for view in (base.T, base.view(536, 14).T[::3], base.T[:, 5:541], base[:1].expand(5, 7)):
        assert not view.is_contiguous()
        expected = topk_select(view.contiguous(), 5, backend="reference")
        result = topk_select(view, 5, backend=backend)
        assert torch.equal(result.indices, expected.indices)
        assert torch.equal(result.values, expected.values)


def test_the_input_is_not_written_to(normal):
    pre = nan_and_inf(normal(5, 536, dtype=torch.float64))
    before = pre.clone()
    topk_select(pre, 3)
    assert torch.equal(pre.view(torch.int64), before.view(torch.int64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_rows(backend):
    result = topk_select(torch.zeros(0, 23), 3, backend=backend)
    assert isinstance(result, TopKResult)
    assert result.values.shape == result.indices.shape == (0, 3)
    assert result.indices.dtype == torch.int64


def test_chunks_of_rows_change_nothing(normal, monkeypatch):
    pre = integers(normal(11, 536))
    whole = topk_select(pre, 7)
    for chunk in (3 * 536, 1):
        monkeypatch.setattr(select, "CHUNK", chunk)
        parts = topk_select(pre, 7)
        assert torch.equal(parts.indices, whole.indices)
        assert torch.equal(parts.values, whole.values)


@pytest.mark.parametrize("n", [197, 257, 1021])
def test_a_pick_knows_the_values_on_both_sides_of_the_boundary(n, normal):
    v = normal(1009, n)
    ordered = v.sort(descending=True).values
    for pick in (select._pick_by_key(v, 29), select._pick_directly(v, 29)):
        assert torch.equal(pick.smallest, ordered[:, 28])
        assert torch.equal(pick.left_out, ordered[:, 29])


def test_temporaries_stay_below_the_input(normal, monkeypatch, largest):
    monkeypatch.setattr(select, "CHUNK", 16 * 1024)
    pre = normal(512, 1024)
    with largest:
        topk_select(pre, 5)
    assert largest.seen == 512 * 5


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_reaches_the_winners_that_pass_the_relu(backend, by_value):
    pre = torch.tensor([[-1.0, 2.0, 5.0, 0.0, 3.0]], requires_grad=True)
    values, indices = topk_select(pre, 4, sorted=by_value, backend=backend)
    assert not indices.requires_grad
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    (values * weights).sum().backward()
    expected = [0, 3, 1, 0, 2] if by_value else [0, 1, 2, 0, 4]
    assert pre.grad is not None
    assert pre.grad.tolist() == [expected]


def test_the_gradient_is_that_of_the_definition(normal):
    pre = normal(5, 104, dtype=torch.float64).requires_grad_()
    for relu in (False, True):
        assert torch.autograd.gradcheck(lambda v, relu=relu: topk_select(v, 61, relu=relu)[0], pre)


def test_bad_arguments_are_refused(shipped):
    bare = shipped(topk_select)
    pre = torch.zeros(5, 23)
    with pytest.raises(ValueError, match="k must lie between 1 and d_sae=23, got 24"):
        bare(pre, 24)
    with pytest.raises(ValueError, match=r"pre must have the shape \(any, any\), got \(23,\)"):
        bare(pre[0], 3)
    with pytest.raises(TypeError, match=r"pre must be floating point, got torch\.int64"):
        bare(pre.long(), 3)
    with pytest.raises(ValueError, match="backend must be one of"):
        bare(pre, 3, backend="triton ")


def test_reference_takes_the_first_of_a_stable_sort():
    result = topk_select_reference(torch.tensor([[0.0, -0.0, 1.0, NAN]]), 3, sorted=True)
    assert result.indices.tolist() == [[3, 2, 0]]
