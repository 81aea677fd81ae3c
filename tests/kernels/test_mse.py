import pytest
import torch

from sae_kernels import sparse_decode, sparse_decode_mse

BACKENDS = ["reference", "torch"]
BATCH, K, D_SAE, D_OUT = 13, 5, 61, 7
PREFIXES = [None, (D_SAE,), (1, 2, 17, 43, D_SAE)]
NAMES = ("values", "dec_rows", "b_dec", "target")


@pytest.fixture
def step(normal):
    """Latents with padding at 0 and a repeated index; some prefixes of rows are empty."""
    indices = torch.randint(0, D_SAE, (BATCH, K), generator=torch.Generator().manual_seed(1))
    indices = indices.sort(dim=1).values
    indices[2] = torch.tensor([0, 0, 0, 17, 60])
    indices[3] = 59
    values = normal(BATCH, K, seed=2, dtype=torch.float64)
    values[2, :2] = 0.0
    rows = normal(D_SAE, D_OUT, seed=3, dtype=torch.float64)
    bias = normal(D_OUT, seed=4, dtype=torch.float64)
    return indices, (values, rows, bias, normal(BATCH, D_OUT, seed=5, dtype=torch.float64))


def dense(indices, tensors, scale, prefixes):
    """Write the latents out, and decode each prefix with a matrix product."""
    values, rows, bias, target = tensors
    acts = torch.zeros(len(values), len(rows), dtype=rows.dtype).scatter_add(1, indices, values)
    errors = []
    for end in prefixes or (len(rows),):
        x_hat = acts[:, :end] @ rows[:end] + bias
        errors.append((x_hat - target).square().sum(1))
    row_loss = torch.stack(errors, 1)
    return scale * row_loss.sum(), x_hat, row_loss


def fused(indices, tensors, scale, prefixes, backend="torch"):
    values, rows, bias, target = tensors
    return sparse_decode_mse(
        values, indices, rows, bias, target, scale=scale, prefixes=prefixes, backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answer(backend):
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], requires_grad=True)
    values = torch.tensor([[1.0, 2.0]], requires_grad=True)
    result = sparse_decode_mse(
        values,
        torch.tensor([[0, 2]]),
        rows,
        None,
        torch.tensor([[0.0, 1.0]]),
        scale=0.5,
        prefixes=[1, 3],
        backend=backend,
    )
    assert result.x_hat.tolist() == [[7.0, 0.0]]
    assert result.row_loss[0].tolist() == pytest.approx([2.0, 50.0], rel=1e-6)
    assert result.loss.item() == pytest.approx(26.0, rel=1e-6)
    result.loss.backward()
    assert values.grad is not None
    assert rows.grad is not None
    # errors (1, -1) and (7, -1); latent 0 feels both, latent 2 the second alone
    assert values.grad.tolist() == [[8.0, 21.0]]
    assert rows.grad.tolist() == [[8.0, -2.0], [0.0, 0.0], [14.0, -2.0]]


@pytest.mark.parametrize("prefixes", PREFIXES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_equal_dense_autograd(backend, prefixes, step):
    indices, tensors = step
    results = []
    for function in (lambda *a: fused(*a, backend=backend), dense):
        inputs = [t.clone().requires_grad_() for t in tensors]
        outputs = function(indices, inputs, 0.3, prefixes)
        results.append((*outputs, *torch.autograd.grad(outputs[0] * 1.7, inputs)))
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize("prefixes", [None, PREFIXES[-1]])
def test_gradcheck(prefixes, step):
    indices, tensors = step
    inputs = [t.clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: fused(indices, t, 0.1, prefixes).loss, inputs)


@pytest.mark.parametrize("prefixes", PREFIXES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_alone_has_gradients(backend, prefixes, step):
    indices, tensors = step
    result = fused(indices, [t.requires_grad_() for t in tensors], 0.1, prefixes, backend)
    assert result.loss.requires_grad
    assert not result.x_hat.requires_grad
    assert not result.row_loss.requires_grad


@pytest.mark.parametrize("prefixes", PREFIXES)
@pytest.mark.parametrize("asked", NAMES)
def test_only_what_is_needed_gets_a_gradient(asked, prefixes, step):
    indices, tensors = step
    inputs = [t.clone().requires_grad_() for t in tensors]
    everything = torch.autograd.grad(fused(indices, inputs, 0.1, prefixes).loss, inputs)
    inputs = [t.clone().requires_grad_(n == asked) for n, t in zip(NAMES, tensors, strict=True)]
    fused(indices, inputs, 0.1, prefixes).loss.backward()
    for tensor, name, full in zip(inputs, NAMES, everything, strict=True):
        assert (tensor.grad is not None) == (name == asked)
        if tensor.grad is not None:
            assert torch.equal(tensor.grad, full)


def test_second_derivatives_are_refused(step):
    indices, tensors = step
    rows = tensors[1].requires_grad_()
    loss = fused(indices, tensors, 0.1, None).loss
    (gradient,) = torch.autograd.grad(loss**2, rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("prefixes", [None, (3, 211, 503)])
def test_float32_equals_float64(prefixes, normal):
    indices = torch.randint(0, 503, (61, 11), generator=torch.Generator().manual_seed(3))
    indices = indices.sort(dim=1).values
    shapes = ((61, 11), (503, 29), (29,), (61, 29))
    single = [normal(*shape, seed=s) for s, shape in enumerate(shapes)]
    results = []
    for tensors, function in ((single, fused), ([t.double() for t in single], dense)):
        inputs = [t.clone().requires_grad_() for t in tensors]
        outputs = function(indices, inputs, 1 / 61, prefixes)
        results.append((*outputs, *torch.autograd.grad(outputs[0], inputs)))
    for got, want in zip(*results, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 1e-6 * want.norm()


def test_the_reconstruction_is_that_of_sparse_decode(step):
    indices, (values, rows, bias, target) = step
    for prefixes in PREFIXES[:2]:
        result = sparse_decode_mse(
            values, indices, rows, bias, target, scale=1.0, prefixes=prefixes
        )
        assert torch.equal(result.x_hat, sparse_decode(values, indices, rows, bias))
    result = sparse_decode_mse(values, indices, rows, None, target, scale=1.0)
    assert torch.equal(result.x_hat, sparse_decode(values, indices, rows))


@pytest.mark.parametrize("prefixes", PREFIXES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_16_bits(backend, prefixes, step):
    indices, tensors = step
    exact = dense(indices, tensors, 0.1, prefixes)
    values, rows, bias, target = tensors
    low = [values.float(), rows.bfloat16(), bias.bfloat16(), target.float()]
    low = [t.requires_grad_() for t in low]
    with torch.autocast("cpu", torch.bfloat16):
        result = fused(indices, low, 0.1, prefixes, backend)
    assert [t.dtype for t in result] == [torch.float32, torch.bfloat16, torch.float32]
    for got, want in zip(result, exact, strict=True):
        assert (got.double() - want).norm() <= 2e-2 * want.norm()
    gradients = torch.autograd.grad(result.loss, low)
    assert [g.dtype for g in gradients] == [t.dtype for t in low]


@pytest.mark.parametrize("prefixes", PREFIXES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_have_no_loss(backend, prefixes, step):
    indices, (values, rows, bias, target) = step
    inputs = [t.requires_grad_() for t in (values[:0], rows, bias, target[:0])]
    result = fused(indices[:0], inputs, 0.1, prefixes, backend)
    assert result.x_hat.shape == (0, D_OUT)
    assert result.row_loss.shape == (0, len(prefixes or [0]))
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert rows.grad is not None
    assert rows.grad.abs().max() == 0


def test_a_prefix_costs_no_gather_of_its_own(normal, largest):
    batch, k, d_sae, d_out = 101, 31, 1009, 37
    indices = torch.randint(0, d_sae, (batch, k), generator=torch.Generator().manual_seed(0))
    indices = indices.sort(dim=1).values
    inputs = [normal(batch, k), normal(d_sae, d_out), normal(d_out), normal(batch, d_out)]
    with largest:
        fused(indices, [t.requires_grad_() for t in inputs], 1.0, (11, 101, d_sae)).loss.backward()
    assert largest.seen == d_sae * d_out


def test_bad_arguments_are_refused(shipped, step):
    bare = shipped(sparse_decode_mse)
    indices, (values, rows, bias, target) = step
    for prefixes in ((), (5, 5, D_SAE), (0, D_SAE), (7, 5, D_SAE), (3, 60)):
        with pytest.raises(ValueError, match="prefixes must rise from at least 1 to d_sae=61, got"):
            bare(values, indices, rows, bias, target, scale=1.0, prefixes=prefixes)
    with pytest.raises(ValueError, match="indices must ascend within a row for prefixes"):
        bare(values, indices.flip(1), rows, bias, target, scale=1.0, prefixes=(3, D_SAE))
    with pytest.raises(ValueError, match=r"target must have the shape \(13, 7\), got \(13, 6\)"):
        bare(values, indices, rows, bias, target[:, 1:], scale=1.0)
    with pytest.raises(ValueError, match=r"indices must lie in 0\.\.3, got values from"):
        bare(values, indices, rows[:4], bias, target, scale=1.0)
    with pytest.raises(TypeError, match=r"target must be floating point, got torch\.int64"):
        bare(values, indices, rows, bias, target.long(), scale=1.0)
    with pytest.raises(TypeError, match="b_dec must have the dtype of dec_rows"):
        bare(values, indices, rows, bias.float(), target, scale=1.0)
    with pytest.raises(ValueError, match="backend must be one of"):
        bare(values, indices, rows, bias, target, scale=1.0, backend="fast")


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("prefixes", PREFIXES)
def test_rows_of_any_length_give_what_padded_ones_give(backend, prefixes, step):
    """Without the padding, and with a row that has nothing."""
    indices, tensors = step
    kept = torch.ones_like(indices, dtype=torch.bool)
    kept[2, :2] = kept[5] = False
    dtype = torch.float32 if backend == "triton" else torch.float64
    values = tensors[0].masked_fill(~kept, 0.0)
    wide = [t.to(dtype).clone().requires_grad_() for t in (values, *tensors[1:])]
    flat = [t.detach().clone().requires_grad_() for t in (wide[0][kept], *wide[1:])]
    row_ptr = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    options = {"scale": 0.3, "prefixes": prefixes, "backend": backend}
    expected = sparse_decode_mse(wide[0], indices, *wide[1:], **options)
    result = sparse_decode_mse(flat[0], indices[kept], *flat[1:], row_ptr=row_ptr, **options)
    torch.testing.assert_close(result, expected)
    (3.0 * expected.loss).backward()
    (3.0 * result.loss).backward()
    torch.testing.assert_close(flat[0].grad, wide[0].grad[kept])
    for got, want in zip(flat[1:], wide[1:], strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_entries_that_fall_within_a_row_are_refused(shipped, normal):
    bare, rows, target = shipped(sparse_decode_mse), normal(7, 3), normal(2, 3)
    options = {"scale": 1.0, "prefixes": (2, 7), "row_ptr": torch.tensor([0, 2, 4])}
    bare(normal(4), torch.tensor([5, 6, 1, 2]), rows, None, target, **options)
    with pytest.raises(ValueError, match="indices must ascend within a row for prefixes"):
        bare(normal(4), torch.tensor([5, 6, 2, 1]), rows, None, target, **options)
