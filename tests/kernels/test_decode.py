import pytest
import torch

from sae_kernels import sparse_decode

BACKENDS = ["reference", "torch"]
BATCH, K, D_SAE, D_OUT = 5, 3, 23, 7


@pytest.fixture
def step(normal):
    """Latents with a repeated index, a zero value and latents that never fire."""
    indices = torch.randint(0, D_SAE // 2, (BATCH, K), generator=torch.Generator().manual_seed(2))
    indices[1] = 4
    values = normal(BATCH, K, seed=3, dtype=torch.float64)
    values[2, 1] = 0.0
    rows = normal(D_SAE, D_OUT, seed=4, dtype=torch.float64)
    return values, indices, rows, normal(D_OUT, seed=5, dtype=torch.float64)


def dense(values, indices, rows, bias):
    """Write the latents out, one by one, and multiply."""
    acts = torch.zeros(len(values), len(rows), dtype=rows.dtype)
    for n in range(len(values)):
        for value, index in zip(values[n], indices[n], strict=True):
            acts[n, index] = acts[n, index] + value
    return acts @ rows + bias


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answer(backend):
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]])
    values, indices = torch.tensor([[2.0, 10.0], [1.0, 1.0]]), torch.tensor([[0, 2], [1, 1]])
    x_hat = sparse_decode(values, indices, rows, backend=backend)
    assert x_hat.tolist() == [[22.0, 30.0], [0.0, 2.0]]
    x_hat = sparse_decode(values, indices, rows, torch.tensor([1.0, -1.0]), backend=backend)
    assert x_hat.tolist() == [[23.0, 29.0], [1.0, 1.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_equals_dense_matmul(backend, dtype, step):
    values, indices, rows, bias = step
    x_hat = sparse_decode(values, indices.to(dtype), rows, bias, backend=backend)
    assert (x_hat - dense(values, indices, rows, bias)).abs().max() < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, step):
    values, indices, rows, bias = step
    inputs = [t.clone().requires_grad_() for t in (values, rows, bias)]
    assert torch.autograd.gradcheck(
        lambda v, r, b: sparse_decode(v, indices, r, b, backend=backend), inputs
    )


def test_gradients_equal_dense_autograd_in_float32(normal):
    values, rows, bias = normal(61, 11), normal(503, 29, seed=1), normal(29, seed=2)
    indices = torch.randint(0, 503, (61, 11), generator=torch.Generator().manual_seed(3))
    weights = normal(61, 29, seed=4)
    gradients = []
    for decode in (sparse_decode, dense):
        inputs = [t.clone().requires_grad_() for t in (values, rows, bias)]
        out = decode(inputs[0], indices, inputs[1], inputs[2])
        gradients.append(torch.autograd.grad((out * weights).sum(), inputs))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_a_value_of_zero_has_the_gradient_of_its_direction(step):
    values, indices, rows, _ = step
    values.requires_grad_()
    sparse_decode(values, indices, rows).sum().backward()
    assert values.grad is not None
    assert values.grad[2, 1].item() == pytest.approx(rows[indices[2, 1]].sum().item(), rel=1e-12)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_what_is_needed_gets_a_gradient(needed, step):
    values, indices, rows, _ = step
    values.requires_grad_(needed[0])
    rows.requires_grad_(needed[1])
    sparse_decode(values, indices, rows).sum().backward()
    assert (values.grad is not None, rows.grad is not None) == needed


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_decode_like_their_copies(backend, step, normal):
    values, indices, rows, _ = step
    wide = torch.stack([rows, -rows], dim=2)
    for view in (rows.T.contiguous().T, wide[:, :, 0]):
        assert not view.is_contiguous()
        inputs = [values.T.contiguous().T.requires_grad_(), view.detach().requires_grad_()]
        out = sparse_decode(inputs[0], indices.T.contiguous().T, inputs[1], backend=backend)
        grad = normal(D_OUT, BATCH, dtype=torch.float64).T
        d_values, d_rows = torch.autograd.grad(out, inputs, grad)
        same = [values.detach().clone().requires_grad_(), rows.clone().requires_grad_()]
        expected = dense(same[0], indices, same[1], 0.0)
        for got, want in zip(
            (out, d_values, d_rows),
            (expected, *torch.autograd.grad(expected, same, grad)),
            strict=True,
        ):
            assert (got - want).abs().max() < 1e-13


def test_the_gradient_of_a_sum_is_expanded_and_still_right(step):
    values, indices, rows, _ = step
    rows.requires_grad_()
    sparse_decode(values, indices, rows).sum().backward()
    totals = torch.zeros(D_SAE, dtype=torch.float64)
    for index, value in zip(indices.flatten(), values.flatten(), strict=True):
        totals[index] += value
    assert rows.grad is not None
    assert (rows.grad - totals[:, None]).abs().max() < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_has_the_dtype_of_the_rows(backend, step):
    values, indices, rows, bias = step
    exact = dense(values, indices, rows, bias)
    for dtype, tolerance in [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)]:
        low = [values.float().requires_grad_(), rows.to(dtype).requires_grad_()]
        out = sparse_decode(low[0], indices, low[1], bias.to(dtype), backend=backend)
        assert out.dtype == dtype
        assert (out.double() - exact).norm() <= tolerance * exact.norm()
        d_values, d_rows = torch.autograd.grad(out.sum(), low)
        assert (d_values.dtype, d_rows.dtype) == (torch.float32, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_lower_the_precision(backend, step):
    values, indices, rows, bias = (t.float() if t.is_floating_point() else t for t in step)
    plain = sparse_decode(values, indices, rows, bias, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_decode(values, indices, rows, bias, backend=backend)
    assert torch.equal(out, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_decode_to_no_rows(backend, step):
    _, _, rows, bias = step
    values = torch.zeros(0, K, dtype=torch.float64, requires_grad=True)
    rows.requires_grad_()
    out = sparse_decode(values, torch.zeros(0, K, dtype=torch.int64), rows, bias, backend=backend)
    assert out.shape == (0, D_OUT)
    out.sum().backward()
    assert rows.grad is not None
    assert rows.grad.abs().max() == 0


def test_second_derivatives_are_refused(step):
    values, indices, rows, _ = step
    rows.requires_grad_()
    out = sparse_decode(values, indices, rows)
    (gradient,) = torch.autograd.grad((out**2).sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_runs_repeat_bit_by_bit(normal):
    indices = torch.randint(0, 5, (257, 7), generator=torch.Generator().manual_seed(0))
    results = []
    for _ in range(2):
        inputs = [normal(257, 7).requires_grad_(), normal(11, 67).requires_grad_()]
        out = sparse_decode(inputs[0], indices, inputs[1])
        results.append((out, *torch.autograd.grad((out**2).sum(), inputs)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_no_row_is_gathered_per_entry(normal, largest):
    batch, k, d_sae, d_out = 101, 31, 211, 37
    indices = torch.randint(0, d_sae, (batch, k), generator=torch.Generator().manual_seed(0))
    inputs = [normal(batch, k).requires_grad_(), normal(d_sae, d_out).requires_grad_()]
    with largest:
        sparse_decode(inputs[0], indices, inputs[1]).sum().backward()
    assert largest.seen == d_sae * d_out


def test_bad_arguments_are_refused(shipped, step):
    bare = shipped(sparse_decode)
    values, indices, rows, bias = step
    with pytest.raises(ValueError, match=r"indices must have the shape \(5, 3\), got \(5, 2\)"):
        bare(values, indices[:, :2], rows)
    with pytest.raises(ValueError, match=r"b_dec must have the shape \(7\), got \(6,\)"):
        bare(values, indices, rows, bias[:6])
    with pytest.raises(ValueError, match=r"dec_rows must have the shape \(any, any\), got \(7,\)"):
        bare(values, indices, rows[0])
    with pytest.raises(ValueError, match=r"values must have the shape \(any, any\), got \(3,\)"):
        bare(values[0], indices, rows)
    with pytest.raises(ValueError, match=r"indices must lie in 0\.\.3, got values from"):
        bare(values, indices, rows[:4])
    with pytest.raises(TypeError, match=r"indices must be integers, got torch\.float64"):
        bare(values, indices.double(), rows)
    with pytest.raises(TypeError, match=r"values must be floating point, got torch\.int64"):
        bare(indices, indices, rows)
    with pytest.raises(TypeError, match=r"dec_rows must have the dtype of values, torch\.float64"):
        bare(values, indices, rows.float())
    with pytest.raises(TypeError, match=r"dec_rows must have the dtype of values, torch\.float16"):
        bare(values.half(), indices, rows.bfloat16())
    with pytest.raises(TypeError, match="b_dec must have the dtype of dec_rows"):
        bare(values, indices, rows, bias.float())
    with pytest.raises(ValueError, match="backend must be one of"):
        bare(values, indices, rows, backend="fast")
