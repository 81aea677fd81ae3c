import pytest
import torch

from sae_kernels import adam, latent_adam_

BACKENDS = ["reference", "torch"]
D_SAE, D_OUT = 103, 37


def by_hand(rows, grads, *, lr, betas, eps, weight_decay, project, norm, clips):
    """Run Adam in float64, one row at a time, from its equations."""
    rows = rows.double().clone()
    m, v = torch.zeros_like(rows), torch.zeros_like(rows)
    for t, (grad, clip) in enumerate(zip(grads, clips, strict=True), start=1):
        for j in range(len(rows)):
            w, g = rows[j].clone(), grad[j].double() * float(clip)
            if project and w.norm() > 0:
                direction = w / w.norm()
                g = g - direction * torch.dot(direction, g)
            m[j] = betas[0] * m[j] + (1 - betas[0]) * g
            v[j] = betas[1] * v[j] + (1 - betas[1]) * g * g
            w -= lr * weight_decay * w
            w -= lr * (m[j] / (1 - betas[0] ** t)) / ((v[j] / (1 - betas[1] ** t)).sqrt() + eps)
            length = w.norm()
            if (norm == "unit" and length > 0) or (norm == "max" and length > 1):
                w = w / length
            rows[j] = w
    return rows, m, v


def problem(normal, dtype=torch.float32):
    rows = normal(D_SAE, D_OUT, seed=1, dtype=dtype)
    rows = rows / rows.norm(dim=1, keepdim=True)
    rows[::3] *= 0.5  # some below norm 1, some far above it
    rows[1::7] *= 3.0
    return rows, [normal(D_SAE, D_OUT, seed=s, dtype=dtype) for s in (2, 3, 4)]


def run(rows, grads, backend, *, clips=None, shadow=None, **options):
    rows = rows.clone()
    states = torch.zeros_like(rows), torch.zeros_like(rows)
    for t, grad in enumerate(grads, start=1):
        clip = None if clips is None else clips[t - 1]
        latent_adam_(rows, grad, *states, t, clip=clip, shadow=shadow, backend=backend, **options)
    return rows, *states


@pytest.mark.parametrize("norm", ["none", "unit", "max"])
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_steps_equal_float64(backend, betas, weight_decay, project, norm, normal):
    rows, grads = problem(normal)
    clips = [torch.tensor(c) for c in (0.25, 1.0, 0.5)]
    options = {"lr": 0.03, "betas": betas, "eps": 1e-7, "weight_decay": weight_decay}
    options |= {"project": project, "norm": norm}
    expected = by_hand(rows, grads, clips=clips, **options)
    for got, want in zip(run(rows, grads, backend, clips=clips, **options), expected, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 1e-6 * want.norm() + 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_keeps_its_digits(backend, normal):
    rows, grads = problem(normal, torch.float64)
    options = {"lr": 0.03, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    options |= {"project": True, "norm": "unit"}
    expected = by_hand(rows, grads, clips=[1.0] * 3, **options)
    for got, want in zip(run(rows, grads, backend, **options), expected, strict=True):
        assert (got - want).norm() <= 1e-13 * want.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answer(backend):
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    grad = torch.tensor([[5.0, 1.0], [-1.0, 7.0]])
    m, v = torch.zeros(2, 2), torch.zeros(2, 2)
    latent_adam_(rows, grad, m, v, 1, lr=0.5, eps=1e-12, project=True, backend=backend)
    # what is left of the gradient is orthogonal, and Adam's first step is lr * sign
    assert torch.allclose(rows, torch.tensor([[1.0, -0.5], [0.5, 2.0]]))
    assert torch.allclose(m, torch.tensor([[0.0, 0.1], [-0.1, 0.0]]))


def test_the_plain_step_is_that_of_torch(normal):
    rows, grads = problem(normal)
    theirs = torch.nn.Parameter(rows.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for grad in grads:
        theirs.grad = grad
        optimizer.step()
    ours, _, _ = run(rows, grads, "torch", lr=0.01, weight_decay=0.1)
    assert (ours - theirs.detach()).abs().max() <= 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_projected_unit_rows_stay_unit_and_orthogonal_to_the_gradient(backend, normal):
    rows, grads = problem(normal)
    rows = rows / rows.norm(dim=1, keepdim=True)
    after, m, _ = run(rows, grads[:1], backend, lr=0.1, project=True, norm="unit")
    assert (after.norm(dim=1) - 1).abs().max() < 2e-7
    assert (m * rows).sum(1).abs().max() < 1e-6
    assert (after - rows).norm() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_leaves_short_rows_alone(backend):
    rows, zeros = torch.tensor([[0.3, 0.4], [3.0, 4.0]]), torch.zeros(2, 2)
    latent_adam_(rows, zeros, zeros.clone(), zeros.clone(), 1, lr=1.0, norm="max", backend=backend)
    assert torch.allclose(rows, torch.tensor([[0.3, 0.4], [0.6, 0.8]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["none", "unit", "max"])
def test_a_row_of_zeros_stays_finite(backend, norm, normal):
    rows = torch.zeros(3, D_OUT)
    states = torch.zeros_like(rows), torch.zeros_like(rows)
    zero, options = torch.zeros_like(rows), {"lr": 0.1, "project": True, "norm": norm}
    latent_adam_(rows, zero, *states, 1, backend=backend, **options)
    assert rows.abs().max() == 0
    latent_adam_(rows, normal(3, D_OUT), *states, 2, backend=backend, **options)
    assert rows.isfinite().all()
    assert rows.abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_shadow_is_the_rows_rounded(backend, normal):
    rows, grads = problem(normal)
    shadow = torch.full(rows.shape, torch.nan, dtype=torch.bfloat16)
    after, _, _ = run(rows, grads, backend, lr=0.03, norm="unit", shadow=shadow)
    assert torch.equal(shadow, after.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_left_as_it_is(backend, normal):
    rows, grads = problem(normal)
    before = grads[0].clone()
    clips = [torch.tensor(0.5)] * 3
    run(rows, grads, backend, lr=0.03, project=True, norm="unit", clips=clips)
    assert torch.equal(grads[0], before)


def test_chunks_change_nothing(normal, monkeypatch):
    rows, grads = problem(normal)
    options = {"lr": 0.03, "project": True, "norm": "unit"}
    whole = run(rows, grads, "torch", **options)
    monkeypatch.setattr(adam, "CHUNK", 11 * D_OUT)
    for one, two in zip(run(rows, grads, "torch", **options), whole, strict=True):
        assert (one - two).abs().max() <= 1e-7


def test_no_temporary_is_as_large_as_the_weights(normal, monkeypatch, largest):
    monkeypatch.setattr(adam, "CHUNK", 11 * D_OUT)
    rows, grads = problem(normal)
    states = torch.zeros_like(rows), torch.zeros_like(rows)
    clip = torch.tensor(0.5)
    with largest:
        latent_adam_(rows, grads[0], *states, 1, lr=0.1, project=True, norm="unit", clip=clip)
    assert largest.seen == 11 * D_OUT


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_and_a_strided_gradient_are_taken(backend, normal):
    rows, grads = problem(normal)
    parameter = torch.nn.Parameter(rows.clone())
    states = torch.zeros_like(rows), torch.zeros_like(rows)
    strided = grads[0].T.contiguous().T
    assert not strided.is_contiguous()
    latent_adam_(parameter, strided, *states, 1, lr=0.1, backend=backend)
    expected, _, _ = run(rows, grads[:1], "reference", lr=0.1)
    assert (parameter.detach() - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_are_no_work(backend):
    none = torch.zeros(0, 5)
    latent_adam_(none, none, none.clone(), none.clone(), 1, lr=0.1, norm="unit", backend=backend)
    assert none.shape == (0, 5)


def test_bad_arguments_are_refused(shipped, normal):
    bare = shipped(latent_adam_)
    rows, (grad, *_) = problem(normal)
    m, v = torch.zeros_like(rows), torch.zeros_like(rows)
    with pytest.raises(ValueError, match=r"grad must have the shape \(103, 37\), got \(102, 37\)"):
        bare(rows, grad[1:], m, v, 1, lr=0.1)
    with pytest.raises(ValueError, match="exp_avg must be contiguous, got the strides"):
        bare(rows, grad, m.T.contiguous().T, v, 1, lr=0.1)
    with pytest.raises(TypeError, match="exp_avg_sq must have the dtype of rows"):
        bare(rows, grad, m, v.double(), 1, lr=0.1)
    with pytest.raises(TypeError, match=r"shadow must have the dtype torch\.bfloat16"):
        bare(rows, grad, m, v, 1, lr=0.1, shadow=rows.half())
    with pytest.raises(ValueError, match=r"clip must have the shape \(\), got \(1,\)"):
        bare(rows, grad, m, v, 1, lr=0.1, clip=torch.ones(1))
    with pytest.raises(ValueError, match="step must be at least 1, got 0; the first step"):
        bare(rows, grad, m, v, 0, lr=0.1)
    with pytest.raises(ValueError, match="norm must be one of 'none', 'unit', 'max', got 'l2'"):
        bare(rows, grad, m, v, 1, lr=0.1, norm="l2")
    with pytest.raises(ValueError, match=r"beta2 must be at least 0 and below 1, got 1\.0"):
        bare(rows, grad, m, v, 1, lr=0.1, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="lr must be finite and at least 0, got nan"):
        bare(rows, grad, m, v, 1, lr=float("nan"))
    with pytest.raises(ValueError, match="backend must be one of"):
        bare(rows, grad, m, v, 1, lr=0.1, backend="fast")


def test_rows_that_no_program_holds_are_stepped_by_torch(normal, monkeypatch):
    monkeypatch.setattr(adam, "choose", lambda _, backend: backend or "triton")
    width = adam.blocks.MAX_ROW + 1
    rows, grad = normal(3, width), normal(3, width, seed=1)
    expected = run(rows, [grad], "torch", lr=0.1, norm="unit", project=True)
    got = run(rows, [grad], None, lr=0.1, norm="unit", project=True)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("norm", ["none", "unit"])
def test_a_step_that_the_device_counts_or_skips(backend, norm, normal):
    rows, grads = problem(normal)
    options = {"lr": 0.03, "norm": norm, "project": norm == "unit", "backend": backend}
    expected = run(rows, grads, **options)
    taken, states = rows.clone(), [torch.zeros_like(rows), torch.zeros_like(rows)]
    for t, grad in enumerate(grads, start=1):
        number = torch.tensor(float(t))
        before = [tensor.clone() for tensor in (taken, *states)]
        nan, shadow = torch.full_like(grad, torch.nan), torch.zeros_like(rows).bfloat16()
        skip = torch.tensor(1.0)
        latent_adam_(taken, nan, *states, number - 1, skip=skip, shadow=shadow, **options)
        assert all(torch.equal(*pair) for pair in zip(before, (taken, *states), strict=True))
        latent_adam_(taken, grad, *states, number, skip=1 - skip, shadow=shadow, **options)
        if backend != "triton":  # whose interpreter rounds otherwise than a GPU
            assert torch.equal(shadow, taken.bfloat16())
    for got, want in zip((taken, *states), expected, strict=True):
        assert (got - want).norm() < 1e-6 * want.norm()


@pytest.mark.parametrize("step", [1, 2, 10, 499, 500, 501, 1_000_000])
@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_the_corrections_keep_their_digits_at_any_step(step, beta, normal):
    rows, zeros = torch.zeros(2, 3), torch.zeros(2, 3)
    latent_adam_(
        rows, torch.ones(2, 3), zeros.clone(), zeros.clone(), step, lr=1.0, eps=1e-30,
        betas=(beta, beta), backend="triton",
    )  # fmt: skip
    # the first moments of states of 0 are those of the gradient alone
    right = (1 - beta) / (1 - beta**step) / ((1 - beta) / (1 - beta**step)) ** 0.5
    torch.testing.assert_close(rows, torch.full_like(rows, -right), rtol=1e-6, atol=0)
