import pytest
import torch

from sae_kernels import WeightGrads, sparse_weight_grads

BACKENDS = ["reference", "torch"]


def by_hand(values, d_values, indices, grad_out, x, d_sae):
    """Add up entry by entry, in float64."""
    dec_rows = torch.zeros(d_sae, grad_out.shape[1], dtype=torch.float64)
    enc_rows = torch.zeros(d_sae, x.shape[1], dtype=torch.float64)
    b_enc = torch.zeros(d_sae, dtype=torch.float64)
    n_fired = torch.zeros(d_sae, dtype=torch.int64)
    for n in range(len(values)):
        for i in range(values.shape[1]):
            j = indices[n, i]
            dec_rows[j] += values[n, i].double() * grad_out[n].double()
            enc_rows[j] += d_values[n, i].double() * x[n].double()
            b_enc[j] += d_values[n, i].double()
            n_fired[j] += int(values[n, i] != 0)
    return WeightGrads(dec_rows, enc_rows, b_enc, n_fired)


@pytest.fixture
def step(normal):
    """A step with zero values, repeated indices, a hot latent and silent ones."""
    batch, k, d_sae, d_in, d_out = 43, 5, 67, 11, 13
    indices = torch.randint(0, d_sae - 7, (batch, k), generator=torch.Generator().manual_seed(1))
    indices[:, 0] = 3
    indices[7] = 5
    values = normal(batch, k, seed=2, dtype=torch.float64)
    values[::3, 1] = 0.0
    d_values = normal(batch, k, seed=3, dtype=torch.float64)
    grad_out = normal(batch, d_out, seed=4, dtype=torch.float64)
    return values, d_values, indices, grad_out, normal(batch, d_in, dtype=torch.float64), d_sae


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answer(backend):
    grads = sparse_weight_grads(
        torch.tensor([[2.0, 0.0], [3.0, -1.0]]),
        torch.tensor([[1.0, 5.0], [1.0, 10.0]]),
        torch.tensor([[0, 2], [0, 3]]),
        torch.tensor([[1.0], [10.0]]),
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        5,
        backend=backend,
    )
    assert grads.dec_rows.tolist() == [[32.0], [0.0], [0.0], [-10.0], [0.0]]
    assert grads.enc_rows.tolist() == [[4, 6], [0, 0], [5, 10], [30, 40], [0, 0]]
    assert grads.b_enc.tolist() == [2.0, 0.0, 5.0, 10.0, 0.0]
    assert grads.n_fired.tolist() == [2, 0, 0, 1, 0]
    assert grads.n_fired.dtype == torch.int64


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_a_sum_by_hand(backend, index_dtype, step):
    values, d_values, indices, *rest = step
    expected = by_hand(*step)
    grads = sparse_weight_grads(values, d_values, indices.to(index_dtype), *rest, backend=backend)
    for got, want in zip(grads, expected, strict=True):
        assert (got - want).abs().max() <= 1e-13 * want.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_formed_in_float32(backend, dtype, step):
    low = [
        t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in step
    ]
    grads = sparse_weight_grads(*low, backend=backend)
    for got, want in zip(grads[:3], by_hand(*low)[:3], strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_lower_the_precision(backend, step):
    low = [t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in step]
    plain = sparse_weight_grads(*low, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        grads = sparse_weight_grads(*low, backend=backend)
    assert all(torch.equal(one, two) for one, two in zip(grads, plain, strict=True))


def test_a_latent_that_fires_in_every_row_keeps_its_precision(normal):
    batch = 4099
    indices = torch.zeros(batch, 1, dtype=torch.int64)
    values, x = normal(batch, 1), normal(batch, 3, seed=1)
    grads = sparse_weight_grads(values, values, indices, x, x, 2)
    want = values.double().T @ x.double()
    assert (grads.dec_rows[:1] - want).norm() <= 2e-6 * want.norm()
    assert grads.dec_rows[1].abs().max() == 0
    assert grads.n_fired.tolist() == [batch, 0]


def test_runs_repeat_bit_by_bit_and_views_equal_copies(step):
    low = [t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in step]
    first = sparse_weight_grads(*low)
    again = sparse_weight_grads(*low)
    views = [t.T.contiguous().T if isinstance(t, torch.Tensor) else t for t in low]
    assert not views[3].is_contiguous()
    viewed = sparse_weight_grads(*views)
    for one, two, three in zip(first, again, viewed, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_has_zero_gradients(backend):
    none = torch.zeros(0, 3)
    grads = sparse_weight_grads(none, none, none.long(), none, none, 7, backend=backend)
    assert [tuple(g.shape) for g in grads] == [(7, 3), (7, 3), (7,), (7,)]
    assert all(g.abs().max() == 0 for g in grads)


def test_nothing_is_recorded_for_autograd(step):
    values, *rest = step
    grads = sparse_weight_grads(values.requires_grad_(), *rest)
    assert not any(g.requires_grad for g in grads)


def test_no_row_is_copied_per_entry(normal, largest):
    batch, k, d_sae, d = 101, 31, 211, 37
    indices = torch.randint(0, d_sae, (batch, k), generator=torch.Generator().manual_seed(0))
    values, x = normal(batch, k), normal(batch, d)
    with largest:
        sparse_weight_grads(values, values, indices, x, x, d_sae)
    assert largest.seen == d_sae * d


def test_bad_arguments_are_refused(shipped, step):
    bare = shipped(sparse_weight_grads)
    values, d_values, indices, grad_out, x, d_sae = step
    with pytest.raises(ValueError, match=r"d_values must have the shape \(43, 5\), got \(43, 4\)"):
        bare(values, d_values[:, 1:], indices, grad_out, x, d_sae)
    with pytest.raises(ValueError, match=r"grad_out must have the shape \(43, any\), got \(42, 13"):
        bare(values, d_values, indices, grad_out[1:], x, d_sae)
    with pytest.raises(ValueError, match=r"x must have the shape \(43, any\), got \(42, 11\)"):
        bare(values, d_values, indices, grad_out, x[1:], d_sae)
    with pytest.raises(ValueError, match=r"indices must have the shape \(43, 5\), got \(43, 4\)"):
        bare(values, d_values, indices[:, 1:], grad_out, x, d_sae)
    with pytest.raises(ValueError, match=r"indices must lie in 0\.\.30, got values from"):
        bare(values, d_values, indices, grad_out, x, 31)
    with pytest.raises(TypeError, match="x must have the dtype of values"):
        bare(values, d_values, indices, grad_out, x.float(), d_sae)
    with pytest.raises(ValueError, match="backend must be one of"):
        bare(values, d_values, indices, grad_out, x, d_sae, backend="fast")
