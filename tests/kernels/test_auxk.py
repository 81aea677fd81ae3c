import math

import pytest
import torch

from sae_kernels import auxk

BACKENDS = ["reference", "torch"]
BATCH, D_IN, D_OUT, D_SAE, K_AUX = 13, 7, 5, 47, 3


@pytest.fixture
def tensors(normal):
    """x, enc_rows, b_enc, dec_rows, b_in, and a mask of 17 dead latents."""
    floats = (
        normal(BATCH, D_IN, seed=1, dtype=torch.float64),
        normal(D_SAE, D_IN, seed=2, dtype=torch.float64),
        normal(D_SAE, seed=3, dtype=torch.float64),
        normal(D_SAE, D_OUT, seed=4, dtype=torch.float64),
        normal(D_IN, seed=5, dtype=torch.float64),
    )
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[torch.randperm(D_SAE, generator=torch.Generator().manual_seed(6))[:17]] = True
    return floats, dead


def run(floats, dead, k_aux=K_AUX, **options):
    x, enc_rows, b_enc, dec_rows, b_in = floats
    return auxk(x, enc_rows, b_enc, dec_rows, dead, k_aux, b_in=b_in, **options)


def by_hand(floats, dead, k_aux):
    """Row after row: sort the dead latents, decode the best, differentiable."""
    x, enc_rows, b_enc, dec_rows, b_in = floats
    rows = []
    for n in range(len(x)):
        pre = {j: (x[n] - b_in) @ enc_rows[j] + b_enc[j] for j in dead.nonzero().flatten().tolist()}
        best = sorted(pre, key=lambda j: -pre[j].item())[:k_aux]
        rows.append(sum(pre[j].relu() * dec_rows[j] for j in best))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answer(backend):
    identity = torch.eye(4)
    out = auxk(
        torch.tensor([[9.0, 3.0, 2.0, 1.0], [9.0, -3.0, -2.0, 1.0]]),
        identity,
        torch.zeros(4),
        10 * identity,
        torch.tensor([False, True, True, True]),
        2,
        backend=backend,
    )
    assert out.tolist() == [[0.0, 30.0, 20.0, 0.0], [0.0, 0.0, 0.0, 10.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k_aux", [1, K_AUX, 11, 17, 1000])
def test_equals_a_sum_by_hand(backend, k_aux, tensors):
    out = run(*tensors, k_aux, backend=backend)
    assert (out - by_hand(*tensors, k_aux)).abs().max() < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_reach_every_input(backend, tensors):
    floats, dead = tensors
    weights = torch.linspace(-1, 2, BATCH * D_OUT, dtype=torch.float64).view(BATCH, D_OUT)
    results = []
    for function in (lambda *a: run(*a, backend=backend), by_hand):
        inputs = [t.clone().requires_grad_() for t in floats]
        out = function(inputs, dead, 11)
        results.append(torch.autograd.grad((out * weights).sum(), inputs))
    for got, want in zip(*results, strict=True):
        assert want.abs().max() > 0
        assert (got - want).abs().max() <= 1e-13 * want.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, tensors):
    (x, *weights, b_in), dead = tensors
    inputs = [t.clone().requires_grad_() for t in (x[:3], *(w[:23] for w in weights), b_in)]
    assert 3 < dead[:23].sum() < 23
    assert torch.autograd.gradcheck(lambda *t: run(t, dead[:23], backend=backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_living_latents_neither_matter_nor_learn(backend, tensors):
    floats, dead = tensors
    expected = run(floats, dead, backend=backend)
    changed = [t.clone() for t in floats]
    changed[1][~dead] += 7.0
    changed[2][~dead] += 100.0
    changed[3][~dead] *= -5.0
    inputs = [t.requires_grad_() for t in changed]
    out = run(inputs, dead, backend=backend)
    assert (out - expected).abs().max() < 1e-13
    for gradient in torch.autograd.grad(out.sum(), inputs[1:4]):
        assert gradient[~dead].abs().max() == 0
        assert gradient[dead].abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_b_in_nothing_is_subtracted(backend, tensors):
    floats, dead = tensors
    x, enc_rows, b_enc, dec_rows, b_in = floats
    plain = auxk(x - b_in, enc_rows, b_enc, dec_rows, dead, K_AUX, backend=backend)
    assert torch.equal(run(floats, dead, backend=backend), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_dead_latents_reconstruct_nothing(backend, tensors):
    floats, dead = tensors
    out = run(floats, torch.zeros_like(dead), backend=backend)
    assert out.shape == (BATCH, D_OUT)
    assert out.dtype == torch.float64
    assert out.abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_index(backend):
    eye = torch.eye(5)
    dead = torch.tensor([False, True, True, False, True])
    out = auxk(torch.ones(1, 5), eye, torch.zeros(5), eye, dead, 2, backend=backend)
    assert out.tolist() == [[0.0, 1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("k_aux", [1, 5, 12, 18])
def test_hard_rows_are_selected_as_the_reference_does(k_aux):
    """Ties, zeros of both signs, infinities and NaN, alone and together, in rows of 19."""
    generator = torch.Generator().manual_seed(8)
    values = torch.tensor([-math.inf, -1.0, -0.0, 0.0, 1e-40, 1.0, 1.0, 2.0, math.inf, math.nan])
    rows = values[torch.randint(len(values), (61, 19), generator=generator)]
    rows[0], rows[1], rows[2] = math.nan, 1.0, math.inf
    eye, dead = torch.eye(19), torch.ones(19, dtype=torch.bool)
    # one-hot inputs would meet inf * 0; the bias carries the values instead
    for row in rows:
        fixed = (torch.zeros(1, 19), eye, row, eye, dead, k_aux)
        finite = row.nan_to_num(7.0, 6.0, -6.0)
        plain = (torch.zeros(1, 19), eye, finite, eye, dead, k_aux)
        want = auxk(*fixed, backend="reference")
        torch.testing.assert_close(
            auxk(*fixed, backend="torch"), want, rtol=0, atol=0, equal_nan=True
        )
        assert torch.equal(auxk(*plain, backend="torch"), auxk(*plain, backend="reference"))


@pytest.mark.parametrize("k_aux", [3, 17])
def test_gradients_under_autocast_are_those_of_float64_nearly(k_aux, tensors):
    (exact, dead), results = tensors, []
    for floats, is_on in (([t.float() for t in exact], True), (exact, False)):
        inputs = [t.clone().requires_grad_() for t in floats]
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            out = run(inputs, dead, k_aux, backend="torch")
        results.append(torch.autograd.grad(out.square().sum(), inputs))
    for got, want in zip(*results, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_lowers_the_products_and_keeps_the_dtype(backend, tensors):
    floats, dead = [t.float() for t in tensors[0]], tensors[1]
    exact = run(floats, dead, 17, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(floats, dead, 17, backend=backend)
    assert out.dtype == torch.float32
    assert 0 < (out - exact).norm() < 2e-2 * exact.norm()


def test_products_are_as_wide_as_the_dead_set(normal, largest):
    batch, d_in, d_sae = 211, 3, 499
    dead = torch.zeros(d_sae, dtype=torch.bool)
    dead[::31] = True
    with largest:
        auxk(
            normal(batch, d_in),
            normal(d_sae, d_in, seed=1),
            normal(d_sae, seed=2),
            normal(d_sae, d_in, seed=3),
            dead,
            5,
        )
    assert largest.seen <= batch * int(dead.sum())


def test_runs_repeat_bit_by_bit(tensors):
    floats, dead = [t.float() for t in tensors[0]], tensors[1]
    results = []
    for _ in range(2):
        inputs = [t.clone().requires_grad_() for t in floats]
        results.append(torch.autograd.grad(run(inputs, dead).sum(), inputs))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_bad_arguments_are_refused(shipped, tensors):
    bare = shipped(auxk)
    (x, enc_rows, b_enc, dec_rows, b_in), dead = tensors
    with pytest.raises(ValueError, match="k_aux must be at least 1, got 0"):
        bare(x, enc_rows, b_enc, dec_rows, dead, 0)
    with pytest.raises(TypeError, match=r"dead must be a mask of bool, got torch\.int64"):
        bare(x, enc_rows, b_enc, dec_rows, dead.long(), K_AUX)
    with pytest.raises(ValueError, match=r"dead must have the shape \(47\), got \(46,\)"):
        bare(x, enc_rows, b_enc, dec_rows, dead[1:], K_AUX)
    with pytest.raises(ValueError, match=r"dec_rows must have the shape \(47, any\), got \(46, 5"):
        bare(x, enc_rows, b_enc, dec_rows[1:], dead, K_AUX)
    with pytest.raises(ValueError, match=r"x must have the shape \(any, 7\), got \(13, 6\)"):
        bare(x[:, 1:], enc_rows, b_enc, dec_rows, dead, K_AUX)
    with pytest.raises(ValueError, match=r"b_in must have the shape \(7\), got \(6,\)"):
        bare(x, enc_rows, b_enc, dec_rows, dead, K_AUX, b_in=b_in[1:])
    with pytest.raises(TypeError, match="dec_rows must have the dtype of x"):
        bare(x, enc_rows, b_enc, dec_rows.float(), dead, K_AUX)
    with pytest.raises(ValueError, match="backend must be one of"):
        bare(x, enc_rows, b_enc, dec_rows, dead, K_AUX, backend="fast")


@pytest.mark.parametrize("most", [17, 20, D_SAE])
def test_a_bound_on_the_dead_changes_nothing_and_spares_the_wait(most, tensors, monkeypatch):
    floats, dead = tensors
    results = []
    for bound in (None, most):
        inputs = [t.clone().requires_grad_() for t in floats]
        with monkeypatch.context() as patch:
            if bound is not None:
                patch.setattr(torch.Tensor, "nonzero", None)
            out = run(inputs, dead, most=bound)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() < 1e-12
