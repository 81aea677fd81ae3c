import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_kernels import topk_select

INF, NAN = float("inf"), float("nan")


def rule(pre: torch.Tensor, k: int) -> list[list[int]]:
    """Value descending, index ascending, NaN first, -0 as +0: in plain Python."""
    out = []
    for row in pre.double().tolist():
        keys = [(-INF if v != v else -v, 0 if v != v else 1, i) for i, v in enumerate(row)]
        out.append(sorted(i for *_, i in sorted(keys)[:k]))
    return out


def check(pre: torch.Tensor, k: int) -> None:
    got = topk_select(pre, k, relu=False)
    assert got.indices.dtype == torch.int64
    assert got.indices.tolist() == rule(pre, k)
    assert torch.equal(
        got.values.nan_to_num(nan=7.5), pre.gather(1, got.indices).nan_to_num(nan=7.5)
    )


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 3, 29, 211])
def test_random_rows_in_every_dtype(dtype, k):
    check(normal(5, 1688).to(dtype), k)
    check(normal(5, 1699).to(dtype), k)


@pytest.mark.parametrize("d_sae", [1, 2, 23, 1024])
def test_smallest_and_largest_k(d_sae):
    for k in {1, d_sae}:
        check(normal(5, d_sae), k)


@pytest.mark.parametrize(
    "pre",
    [
        torch.zeros(3, 520),
        torch.full((3, 520), -2.5),
        torch.tensor([[0.0, -0.0] * 260]),
        torch.tensor([[-0.0, 0.0] * 260]),
        normal(3, 520).round(),
        normal(3, 520).clamp(max=0.0),
        torch.full((3, 520), NAN),
        torch.full((3, 520), -INF).index_fill(1, torch.tensor([7, 300]), 1e-42),
        normal(3, 520).index_fill(1, torch.tensor([3, 77, 500]), NAN),
        normal(3, 520).index_fill(1, torch.tensor([3, 77, 500]), INF),
        torch.cat([normal(3, 260).abs() + 5, normal(3, 260)], dim=1),
        (normal(3, 65)[:, :, None] * torch.ones(8)).flatten(1),
        torch.arange(520.0).expand(3, 520) % 65,
    ],
    ids=[
        "zeros", "equal", "zero signs", "signs swapped", "heavy ties", "half zero", "all NaN",
        "denormals above -inf", "some NaN", "some inf", "winners together", "equal in groups",
        "equal across groups",
    ],
)  # fmt: skip
@pytest.mark.parametrize("k", [1, 5, 67, 519])
def test_adversarial_rows(pre, k):
    check(pre, k)


@given(
    st.lists(st.integers(-3, 3), min_size=64, max_size=64),
    st.integers(1, 64),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_integers_with_heavy_ties(row, k, dtype):
    check(torch.tensor([row]).to(dtype), k)


def test_order_by_value_and_relu():
    pre = torch.tensor([[1.0, -2.0, 3.0, 3.0, -1.0, 2.0]])
    by_value = topk_select(pre, 5, sorted=True)
    assert by_value.indices.tolist() == [[2, 3, 5, 0, 4]]
    assert by_value.values.tolist() == [[3.0, 3.0, 2.0, 1.0, 0.0]]
    by_index = topk_select(pre, 5, relu=False)
    assert by_index.indices.tolist() == [[0, 2, 3, 4, 5]]
    assert by_index.values.tolist() == [[1.0, 3.0, 3.0, -1.0, 2.0]]


def test_backends_agree_and_gradients_reach_the_selected_only():
    pre = normal(5, 1688).requires_grad_()
    for sorted_ in (False, True):
        ours, slow = (
            topk_select(pre, 7, sorted=sorted_, backend=b) for b in ("torch", "reference")
        )
        assert torch.equal(ours.indices, slow.indices)
        assert torch.equal(ours.values, slow.values)
    assert not ours.indices.requires_grad
    (grad,) = torch.autograd.grad(ours.values.sum(), pre)
    expected = torch.zeros_like(pre).scatter(1, ours.indices, 1.0)
    assert torch.equal(grad, expected)


def test_views_and_repeated_calls_give_the_same_bits():
    wide = normal(1688, 5).T
    first, again = topk_select(wide, 9), topk_select(wide.contiguous(), 9)
    assert torch.equal(first.indices, again.indices)
    assert torch.equal(first.values, again.values)


def test_wrong_arguments_are_refused():
    pre = normal(5, 23)
    with pytest.raises(ValueError, match="k must lie between 1 and d_sae=23, got 24"):
        topk_select(pre, 24)
    with pytest.raises(ValueError, match="k must lie between 1 and d_sae=23, got 0"):
        topk_select(pre, 0)
    with pytest.raises(ValueError, match="one of 'reference', 'torch' on cpu, got 'triton'"):
        topk_select(pre, 3, backend="triton")
