import pytest
import torch

from sae_kernels import TopKResult, encode_topk, product, topk_select

BACKENDS = ["reference", "torch"]
BATCH, D_IN, D_SAE, K = 13, 7, 104, 5
NAMES = ("x", "enc_rows", "b_enc", "b_in")


@pytest.fixture
def tensors(normal):
    """x, enc_rows, b_enc, b_in in float64, far from ties; some of the top k are negative."""
    return (
        normal(BATCH, D_IN, seed=1, dtype=torch.float64),
        normal(D_SAE, D_IN, seed=2, dtype=torch.float64),
        normal(D_SAE, seed=3, dtype=torch.float64) - 2.0,
        normal(D_IN, seed=4, dtype=torch.float64),
    )


def run(tensors, k=K, **options):
    x, enc_rows, b_enc, b_in = tensors
    return encode_topk(x, enc_rows, b_enc, k, b_in=b_in, **options)


def dense(tensors, k, relu):
    """Write the definition out with a sort, for torch's own autograd."""
    x, enc_rows, b_enc, b_in = tensors
    pre = (x - b_in) @ enc_rows.T + b_enc
    indices = pre.detach().argsort(dim=1, descending=True)[:, :k].sort(dim=1).values
    values = pre.gather(1, indices)
    return TopKResult(values.relu() if relu else values, indices)


def gradients(function, tensors, weights, **options):
    inputs = [t.clone().requires_grad_() for t in tensors]
    values = function(inputs, **options).values
    return torch.autograd.grad((values * weights).sum(), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answer(backend):
    enc_rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    result = encode_topk(
        torch.tensor([[3.0, 2.0], [0.0, 0.0]]),
        enc_rows,
        torch.tensor([0.5, 0.0, -1.0, 0.25]),
        2,
        b_in=torch.tensor([1.0, 1.0]),
        backend=backend,
    )
    assert result.indices.tolist() == [[0, 2], [0, 3]]
    assert result.values.tolist() == [[2.5, 2.0], [0.0, 1.25]]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("k", [1, K, 97, D_SAE])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_definition(backend, k, relu, tensors):
    result, expected = run(tensors, k, relu=relu, backend=backend), dense(tensors, k, relu)
    assert torch.equal(result.indices, expected.indices)
    assert (result.values - expected.values).abs().max() < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_b_in_nothing_is_subtracted(backend, tensors):
    x, enc_rows, b_enc, b_in = tensors
    plain = encode_topk(x, enc_rows, b_enc, K, backend=backend)
    zero = encode_topk(x, enc_rows, b_enc, K, b_in=torch.zeros_like(b_in), backend=backend)
    assert torch.equal(plain.indices, zero.indices)
    assert torch.equal(plain.values, zero.values)
    assert not torch.equal(plain.indices, run(tensors).indices)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, relu, tensors):
    x, enc_rows, b_enc, b_in = tensors
    inputs = [t.clone().requires_grad_() for t in (x[:5], enc_rows[:23], b_enc[:23], b_in)]
    selected = run(inputs, 19, relu=False).values  # so many that some are negative
    assert (selected < -1e-3).any()
    assert selected.abs().min() > 1e-4  # no value within reach of the ReLU's corner
    assert torch.autograd.gradcheck(
        lambda *t: run(t, 19, relu=relu, backend=backend).values, inputs
    )


@pytest.mark.parametrize("relu", [False, True])
def test_gradients_equal_dense_autograd_in_float32(relu, normal):
    tensors = (normal(61, 29), normal(536, 29, seed=1), normal(536, seed=2), normal(29, seed=3))
    weights = normal(61, 401, seed=4)
    assert (run(tensors, 401, relu=False).values < 0).any()
    ours = gradients(run, tensors, weights, k=401, relu=relu)
    theirs = gradients(dense, tensors, weights, k=401, relu=relu)
    for got, want in zip(ours, theirs, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_needed_gets_a_gradient(name, tensors):
    everything = gradients(run, tensors, 1.0)
    inputs = [t.clone().requires_grad_(n == name) for n, t in zip(NAMES, tensors, strict=True)]
    run(inputs).values.sum().backward()
    for tensor, n, full in zip(inputs, NAMES, everything, strict=True):
        assert (tensor.grad is not None) == (n == name)
        if tensor.grad is not None:
            assert torch.equal(tensor.grad, full)


@pytest.mark.parametrize("asked", NAMES)
def test_gradients_that_are_not_asked_for_are_not_computed(asked, tensors, monkeypatch):
    calls = []
    for name in ("weighted_rows", "segment_sum", "segment_product"):
        true = getattr(product, name)
        monkeypatch.setattr(
            product,
            name,
            lambda *args, true=true, name=name, **options: (
                calls.append(name),
                true(*args, **options),
            )[1],
        )
    inputs = [t.clone().requires_grad_(n == asked) for n, t in zip(NAMES, tensors, strict=True)]
    run(inputs).values.sum().backward()
    expected = {"x": ["weighted_rows"], "enc_rows": ["segment_sum", "segment_product"]}
    assert calls == expected.get(asked, ["segment_sum"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_indices_carry_no_gradient(backend, tensors):
    result = run([t.requires_grad_() for t in tensors], backend=backend)
    assert result.values.requires_grad
    assert not result.indices.requires_grad
    assert result.indices.dtype == torch.int64


def test_second_derivatives_are_refused(tensors):
    x, enc_rows, b_enc, b_in = tensors
    values = run((x, enc_rows.requires_grad_(), b_enc, b_in)).values
    (gradient,) = torch.autograd.grad((values**2).sum(), enc_rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_chunks_of_rows_change_nothing(normal, monkeypatch):
    tensors = (normal(61, 29), normal(536, 29, seed=1), normal(536, seed=2), normal(29, seed=3))
    whole = run(tensors)
    monkeypatch.setattr(product, "WORKSPACE_BYTES", 7 * 536 * 4)
    parts = run(tensors)
    assert torch.equal(parts.indices, whole.indices)
    assert (parts.values - whole.values).abs().max() <= 1e-5


def test_a_workspace_smaller_than_a_row_still_works(tensors, monkeypatch):
    whole = run(tensors)
    monkeypatch.setattr(product, "WORKSPACE_BYTES", 1)
    assert torch.equal(run(tensors).indices, whole.indices)


def test_the_pre_activations_are_never_held_at_once(normal, monkeypatch, largest):
    batch, d_in, d_sae = 499, 5, 1024
    monkeypatch.setattr(product, "WORKSPACE_BYTES", 16 * d_sae * 4)
    inputs = [normal(batch, d_in), normal(d_sae, d_in), normal(d_sae), normal(d_in)]
    with largest:
        run([t.requires_grad_() for t in inputs]).values.sum().backward()
    assert largest.seen == 16 * d_sae


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_multiplies_in_bfloat16_and_selects_in_float32(backend, normal):
    tensors = (normal(61, 29), normal(536, 29, seed=1), normal(536, seed=2), normal(29, seed=3))
    x, enc_rows, b_enc, b_in = tensors
    low = (x - b_in).bfloat16() @ enc_rows.bfloat16().T
    expected = topk_select(low.float() + b_enc, 11)
    with torch.autocast("cpu", torch.bfloat16):
        result = run(tensors, 11, backend=backend)
    assert result.values.dtype == torch.float32
    assert torch.equal(result.indices, expected.indices)
    assert torch.equal(result.values, expected.values)
    assert not torch.equal(result.values, run(tensors, 11).values)


def test_the_gradients_of_autocast_are_summed_in_float32(normal):
    tensors = (normal(61, 29), normal(536, 29, seed=1), normal(536, seed=2), normal(29, seed=3))
    inputs = [t.clone().requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        values, indices = run(inputs, 11)
        ours = torch.autograd.grad(values.sum(), inputs)
    x, enc_rows, b_enc, b_in = (t.clone().requires_grad_() for t in tensors)
    pre = ((x - b_in) @ enc_rows.T + b_enc).gather(1, indices)
    theirs = torch.autograd.grad(pre[values > 0].sum(), (x, enc_rows, b_enc, b_in))
    for got, want in zip(ours, theirs, strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()


def test_float64_is_exact_under_autocast(tensors):
    with torch.autocast("cpu", torch.bfloat16):
        result = run(tensors)
    assert torch.equal(result.values, run(tensors).values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_give_values_of_float32(backend, dtype, tensors):
    low = [t.to(dtype).requires_grad_() for t in tensors]
    x, enc_rows, b_enc, b_in = (t.detach() for t in low)
    centred = (x.float() - b_in.float()).to(dtype)
    expected = topk_select((centred @ enc_rows.T).float() + b_enc.float(), K)
    result = run(low, backend=backend)
    assert result.values.dtype == torch.float32
    assert torch.equal(result.indices, expected.indices)
    assert torch.equal(result.values, expected.values)
    got = torch.autograd.grad(result.values.sum(), low)
    assert {g.dtype for g in got} == {dtype}


def test_centring_keeps_the_digits_that_a_large_mean_hides(normal):
    x, enc_rows, b_enc = normal(31, 17), normal(104, 17, seed=1), normal(104, seed=2)
    mean = torch.full((17,), 1000.0)
    shifted = (x + mean) - mean  # what is left of x in float32
    expected = encode_topk(shifted, enc_rows, b_enc, 104, relu=False)
    with torch.autocast("cpu", torch.bfloat16):
        low = encode_topk(x + mean, enc_rows, b_enc, 104, b_in=mean, relu=False)
    error = (low.values - expected.values).norm() / expected.values.norm()
    assert error < 1e-2  # uncentred, bfloat16 would leave no digit of x


def test_views_encode_like_their_copies(tensors):
    expected = run(tensors)
    weights = torch.ones(BATCH, K, dtype=torch.float64)
    views = [t.T.contiguous().T if t.dim() == 2 else torch.stack([t, t], 1)[:, 0] for t in tensors]
    assert not any(v.is_contiguous() for v in views)
    result = run(views)
    assert torch.equal(result.indices, expected.indices)
    assert (result.values - expected.values).abs().max() < 1e-13
    for got, want in zip(
        gradients(run, views, weights), gradients(run, tensors, weights), strict=True
    ):
        assert (got - want).abs().max() < 1e-12


def test_runs_repeat_bit_by_bit(normal):
    tensors = (normal(257, 29), normal(536, 29, seed=1), normal(536, seed=2), normal(29, seed=3))
    weights = normal(257, 31, seed=5)
    assert all(
        torch.equal(one, two)
        for one, two in zip(
            gradients(run, tensors, weights, k=31),
            gradients(run, tensors, weights, k=31),
            strict=True,
        )
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_rows_and_zero_gradients(backend, tensors):
    inputs = [tensors[0][:0].requires_grad_(), *(t.requires_grad_() for t in tensors[1:])]
    result = run(inputs, backend=backend)
    assert result.values.shape == result.indices.shape == (0, K)
    result.values.sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() == 0 for t in inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_row_is_selected_and_shown(backend, tensors):
    x = tensors[0].clone()
    x[3, 2] = torch.nan
    values, indices = run((x, *tensors[1:]), backend=backend)
    assert values[3].isnan().all()
    assert indices[3].tolist() == [0, 1, 2, 3, 4]
    assert not values[:3].isnan().any()


def test_bad_arguments_are_refused(shipped, tensors):
    bare = shipped(encode_topk)
    x, enc_rows, b_enc, b_in = tensors
    with pytest.raises(ValueError, match=r"x must have the shape \(any, 7\), got \(13, 6\)"):
        bare(x[:, :6], enc_rows, b_enc, K)
    with pytest.raises(ValueError, match=r"b_enc must have the shape \(104\), got \(103,\)"):
        bare(x, enc_rows, b_enc[1:], K)
    with pytest.raises(ValueError, match=r"b_in must have the shape \(7\), got \(6,\)"):
        bare(x, enc_rows, b_enc, K, b_in=b_in[1:])
    with pytest.raises(ValueError, match=r"enc_rows must have the shape \(any, any\), got \(7,\)"):
        bare(x, enc_rows[0], b_enc, K)
    with pytest.raises(ValueError, match="k must lie between 1 and d_sae=104, got 0"):
        bare(x, enc_rows, b_enc, 0)
    with pytest.raises(TypeError, match="b_in must have the dtype of x"):
        bare(x, enc_rows, b_enc, K, b_in=b_in.float())
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        bare(x.long(), enc_rows, b_enc, K)
    with pytest.raises(ValueError, match="backend must be one of"):
        bare(x, enc_rows, b_enc, K, backend="fast")
