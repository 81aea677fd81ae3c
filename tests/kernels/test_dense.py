import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_kernels import dense, dense_autoencode

BACKENDS = ["reference", "torch"]
BATCH, D_IN, D_SAE, D_OUT = 31, 7, 61, 11
NAMES = ("x", "enc_rows", "b_enc", "dec_rows", "b_dec", "b_in", "threshold")


@pytest.fixture
def tensors(normal):
    """All tensors in float64, with a dead latent and a decoder row of zeros."""
    shapes = ((BATCH, D_IN), (D_SAE, D_IN), (D_SAE,), (D_SAE, D_OUT), (D_OUT,), (D_IN,), (D_SAE,))
    x, enc_rows, b_enc, dec_rows, b_dec, b_in, threshold = (
        normal(*shape, seed=seed, dtype=torch.float64) for seed, shape in enumerate(shapes, 1)
    )
    b_enc[5], dec_rows[7] = -1e3, 0.0
    return x, enc_rows, b_enc, dec_rows, b_dec, b_in, threshold.abs() + 0.1


def run(tensors, relu=True, bandwidth=0.5, **options):
    *weights, b_in, threshold = tensors
    threshold = None if relu else threshold
    return dense_autoencode(
        *weights, b_in=b_in, threshold=threshold, bandwidth=bandwidth, **options
    )


class _JumpReLU(torch.autograd.Function):
    """Equations 11 and 12 of arXiv 2407.14435, with a rectangle, for torch's own autograd."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        fires = (pre > threshold).to(pre.dtype)
        return pre * fires, fires

    @staticmethod
    def backward(ctx, d_acts, d_fires):
        pre, threshold = ctx.saved_tensors
        kernel = ((pre - threshold).abs() / ctx.bandwidth < 0.5).to(pre.dtype) / ctx.bandwidth
        d_threshold = -kernel * (threshold * d_acts + d_fires)
        return d_acts * (pre > threshold), d_threshold.sum(0), None


def plain(tensors, relu=True, bandwidth=0.5):
    """Write the model out, with all matrices held."""
    x, enc_rows, b_enc, dec_rows, b_dec, b_in, threshold = tensors
    pre = (x - b_in) @ enc_rows.T + b_enc
    if relu:
        acts, fires = pre.relu(), (pre > 0).to(pre.dtype)
    else:
        acts, fires = _JumpReLU.apply(pre, threshold, bandwidth)
    l1 = (acts * dec_rows.norm(dim=1)).sum(1).mean()
    return acts @ dec_rows + b_dec, l1, fires.sum(1).mean(), (acts != 0).sum(0)


def objective(outputs, weights):
    x_hat, l1, l0, _ = outputs
    return (x_hat * weights).sum() + 1.7 * l1 + 0.9 * l0


def test_known_answer():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    step = dense_autoencode(
        torch.tensor([[2.0, -1.0], [4.0, 4.0]]),
        rows,
        torch.tensor([0.0, 0.0, -3.0]),
        torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]),
        torch.tensor([0.5, 0.0]),
        b_in=torch.tensor([1.0, 1.0]),
    )
    # the first row fires latent 0 alone, with 1; the second all of them, with 3
    assert step.x_hat.tolist() == [[3.5, 4.0], [12.5, 12.0]]
    assert step.l1.item() == pytest.approx((5.0 + 15.0 + 3.0) / 2)
    assert step.l0.item() == 2.0
    assert step.n_fired.tolist() == [2, 1, 1]


@pytest.mark.parametrize("chunk", [1, 5, BATCH])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_equal_autograd(backend, relu, chunk, tensors, normal, monkeypatch):
    monkeypatch.setattr(dense, "CHUNK_BYTES", chunk * D_SAE * 8)
    weights, results = normal(BATCH, D_OUT, seed=9, dtype=torch.float64), []
    for function in (lambda t: run(t, relu, backend=backend), lambda t: plain(t, relu)):
        inputs = [t.clone().requires_grad_() for t in (tensors[:6] if relu else tensors)]
        outputs = function([*inputs, None] if relu else inputs)
        results.append((*outputs, *torch.autograd.grad(objective(outputs, weights), inputs)))
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()
    assert relu or results[1][-1].abs().max() > 0.1  # thresholds do learn


@pytest.mark.parametrize("relu", [True, False])
def test_gradcheck(relu, tensors):
    """Against finite differences, without the pseudo-gradients of the thresholds."""
    tensors = [t[:5] if t.shape[0] == BATCH else t[:13] for t in tensors]
    inputs = [t.clone().requires_grad_() for t in tensors[:6]]
    inputs[3] = (tensors[3] + 0.1).requires_grad_()  # a norm has no derivative at 0
    assert torch.autograd.gradcheck(lambda *t: run((*t, tensors[6]), relu)[:2], inputs)


@pytest.mark.parametrize("relu", [True, False])
def test_float32_equals_float64(relu, normal):
    shapes = ((257, 29), (503, 29), (503,), (503, 23), (23,), (29,), (503,))
    single = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    single[-1].abs_()
    weights, results = normal(257, 23, seed=9), []
    for function, given in ((run, single), (plain, [t.double() for t in single])):
        inputs = [t.clone().requires_grad_() for t in (given[:6] if relu else given)]
        outputs = function([*inputs, None] if relu else inputs, relu)
        results.append((*outputs, *torch.autograd.grad(objective(outputs, weights), inputs)))
    for got, want in zip(*results, strict=True):
        assert (got - want).double().norm() <= 2e-6 * want.double().norm()


def test_b_in_may_be_b_dec(tensors):
    x, enc_rows, b_enc, dec_rows, *_ = tensors
    gradients = []
    for function in (run, plain):
        bias = torch.linspace(-1, 1, D_IN, dtype=torch.float64).requires_grad_()
        inputs = (x, enc_rows, b_enc, dec_rows[:, :D_IN], bias, bias, tensors[6])
        outputs = function(inputs)
        loss = (outputs[0] - x).square().sum() + outputs[1]
        gradients.append(torch.autograd.grad(loss, bias)[0])
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-11 * gradients[1].abs().max()


def test_what_has_no_gradient_is_marked(tensors):
    inputs = [t.clone().requires_grad_() for t in tensors]
    step = run(inputs)
    assert [t.requires_grad for t in step] == [True, True, False, False]
    jump = run(inputs, relu=False)
    assert [t.requires_grad for t in jump] == [True, True, True, False]
    assert step.n_fired.dtype == torch.int64
    gradients = torch.autograd.grad(jump.l0, inputs, allow_unused=True)
    assert gradients[6] is not None
    assert gradients[6].abs().max() > 0
    assert all(g is None or g.abs().max() == 0 for g in gradients[:6])


@pytest.mark.parametrize("asked", NAMES)
def test_only_what_is_needed_gets_a_gradient(asked, tensors, normal):
    weights = normal(BATCH, D_OUT, seed=9, dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in tensors]
    everything = torch.autograd.grad(objective(run(inputs, relu=False), weights), inputs)
    inputs = [t.clone().requires_grad_(n == asked) for n, t in zip(NAMES, tensors, strict=True)]
    objective(run(inputs, relu=False), weights).backward()
    for tensor, name, full in zip(inputs, NAMES, everything, strict=True):
        assert (tensor.grad is not None) == (name == asked)
        if tensor.grad is not None:
            assert (tensor.grad - full).abs().max() <= 1e-12 * full.abs().max()


def test_a_second_backward_of_a_kept_graph_gives_the_same(tensors):
    inputs = [t.clone().requires_grad_() for t in tensors]
    loss = run(inputs).x_hat.square().sum()
    first = torch.autograd.grad(loss, inputs[:6], retain_graph=True)
    second = torch.autograd.grad(loss, inputs[:6])
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_second_derivatives_are_refused(tensors):
    rows = tensors[1].requires_grad_()
    (gradient,) = torch.autograd.grad(run(tensors).x_hat.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("relu", [True, False])
def test_one_dense_matrix_is_held(relu, normal, monkeypatch):
    batch, d_sae = 499, 211
    monkeypatch.setattr(dense, "CHUNK_BYTES", 16 * d_sae * 4)
    shapes = ((batch, 5), (d_sae, 5), (d_sae,), (d_sae, 3), (3,), (5,), (d_sae,))
    inputs = [normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    seen: set[int] = set()

    class Meter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    storage = leaf.untyped_storage()
                    if storage.nbytes() > 32 * d_sae * leaf.element_size():
                        seen.add(storage.data_ptr())
            return result

    with Meter():
        step = run(inputs, relu)
        (step.x_hat.square().sum() + step.l1).backward()
    assert len(seen) == 1


def test_nan_is_shown_and_counted(tensors):
    x = tensors[0].clone()
    x[3, 2] = torch.nan
    for relu in (True, False):
        step = run((x, *tensors[1:]), relu)
        assert step.x_hat[3].isnan().all()
        assert not step.x_hat[:3].isnan().any()
        assert step.l1.isnan()


def test_autocast_does_not_lower_the_precision(tensors):
    single = [t.float() for t in tensors]
    plain_step = run(single)
    with torch.autocast("cpu", torch.bfloat16):
        step = run(single)
    assert all(torch.equal(one, two) for one, two in zip(step, plain_step, strict=True))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_are_no_loss(backend, relu, tensors):
    inputs = [tensors[0][:0].requires_grad_(), *(t.requires_grad_() for t in tensors[1:])]
    step = run(inputs, relu, backend=backend)
    assert step.x_hat.shape == (0, D_OUT)
    assert (step.l1.item(), step.l0.item(), step.n_fired.sum().item()) == (0.0, 0.0, 0)
    (step.x_hat.sum() + step.l1).backward()
    assert inputs[1].grad is not None
    assert inputs[1].grad.abs().max() == 0


def test_bad_arguments_are_refused(shipped, tensors):
    bare = shipped(dense_autoencode)
    x, enc_rows, b_enc, dec_rows, b_dec, b_in, threshold = tensors
    with pytest.raises(ValueError, match=r"dec_rows must have the shape \(61, any\), got \(60, 11"):
        bare(x, enc_rows, b_enc, dec_rows[1:], b_dec)
    with pytest.raises(ValueError, match=r"b_in must have the shape \(7\), got \(6,\)"):
        bare(x, enc_rows, b_enc, dec_rows, b_dec, b_in=b_in[1:])
    with pytest.raises(ValueError, match=r"threshold must have the shape \(61\), got \(60,\)"):
        bare(x, enc_rows, b_enc, dec_rows, b_dec, threshold=threshold[1:])
    with pytest.raises(ValueError, match=r"bandwidth must be above 0, got 0\.0"):
        bare(x, enc_rows, b_enc, dec_rows, b_dec, threshold=threshold, bandwidth=0.0)
    with pytest.raises(TypeError, match="b_dec must have the dtype of x"):
        bare(x, enc_rows, b_enc, dec_rows, b_dec.float())
    with pytest.raises(ValueError, match="backend must be one of"):
        bare(x, enc_rows, b_enc, dec_rows, b_dec, backend="fast")


@pytest.mark.parametrize("relu", [True, False])
def test_products_of_16_bits_round_what_is_multiplied_and_nothing_else(relu, tensors, normal):
    single = [t.float() for t in tensors]
    for place in (0, 1, 3):  # rounded already, so that the same latents fire
        single[place] = single[place].bfloat16().float()
    single[5].zero_()
    x, enc_rows, b_enc, dec_rows, b_dec, b_in, threshold = single
    low = torch.bfloat16
    pre = (x - b_in).to(low).float() @ enc_rows.to(low).float().T + b_enc
    acts = pre.relu() if relu else pre * (pre > threshold)
    x_hat = acts.to(low).float() @ dec_rows.to(low).float() + b_dec
    weights = normal(BATCH, D_OUT, seed=8)
    grads = []
    for products in (low, None):
        inputs = [t.clone().requires_grad_() for t in single]
        if relu:
            inputs[6].requires_grad_(False)
        found = run(inputs, relu=relu, products=products)
        if products is not None:
            torch.testing.assert_close(found.x_hat, x_hat)
            assert torch.equal(found.n_fired, (acts != 0).sum(0))
            assert found.l0 == (acts != 0).sum() / BATCH
        learns = [t for t in inputs if t.requires_grad]
        grads.append(torch.autograd.grad(objective(found, weights), learns))
    for got, want in zip(*grads, strict=True):
        assert (got - want).norm() < 0.01 * want.norm()
