"""The kernel of `latent_adam_` in Triton's interpreter, against float64."""

import itertools
import math

import pytest
import torch

from sae_kernels import blocks
from sae_kernels.adam_triton import latent_adam_

LR, BETA1, BETA2, EPS = 0.03, 0.9, 0.999, 1e-8


def right_step(rows, grad, exp_avg, exp_avg_sq, step, weight_decay, project, norm, clip):
    """The definition, in the dtype of its inputs; returns the new rows and states."""
    grad = grad * clip
    if project:
        grad = grad - rows * (grad * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
    exp_avg = BETA1 * exp_avg + (1 - BETA1) * grad
    exp_avg_sq = BETA2 * exp_avg_sq + (1 - BETA2) * grad.square()
    root = (exp_avg_sq / (1 - BETA2**step)).sqrt()
    rows = (1 - LR * weight_decay) * rows - LR * (exp_avg / (1 - BETA1**step)) / (root + EPS)
    norms = rows.norm(dim=1, keepdim=True)
    if norm != "none":
        rows = rows / (norms if norm == "unit" else norms.clamp_min(1))
    return rows, exp_avg, exp_avg_sq


def step_(state, grad, step, *, weight_decay=0.0, project=False, norm="none", clip=None, **more):
    """One step of the kernel at the settings of `right_step`."""
    latent_adam_(
        state[0],
        grad,
        state[1],
        state[2],
        lr=LR,
        beta1=BETA1,
        beta2=BETA2,
        eps=EPS,
        weight_decay=weight_decay,
        step=torch.tensor(float(step)),
        skip=None,
        project=project,
        norm=norm,
        clip=clip,
        shadow=more.get("shadow"),
    )


@pytest.mark.parametrize("shape", [(3, 2), (7, 23), (5, 257)], ids=str)
@pytest.mark.parametrize(
    ("project", "norm", "clip", "weight_decay"),
    [*itertools.product([False, True], ["none", "unit", "max"], [None, 0.37], [0.0, 0.1])],
)
def test_three_steps(shape, project, norm, clip, weight_decay, normal, error):
    rows = normal(*shape) * (1.0 if norm == "none" else 2 * shape[1] ** -0.5)
    state = [rows, torch.zeros(shape), torch.zeros(shape)]
    right = [tensor.double() for tensor in state]
    for step in (1, 2, 3):
        grad = normal(*shape, seed=step)
        factor = None if clip is None else torch.tensor(clip)
        step_(state, grad, step, weight_decay=weight_decay, project=project, norm=norm, clip=factor)
        scale = 1.0 if factor is None else factor.double()
        right = right_step(
            *right[:1], grad.double(), *right[1:], step, weight_decay, project, norm, scale
        )
        for tensor, expected in zip(state, right, strict=True):
            assert error(tensor, expected) < 2e-6
    if norm == "unit":
        assert torch.allclose(state[0].norm(dim=1), torch.ones(shape[0]), rtol=1e-6)
    if norm == "max":
        assert (state[0].norm(dim=1) <= 1 + 1e-6).all()


def test_max_norm_leaves_short_rows_alone(normal):
    short = normal(3, 23) * 1e-3
    one, other = ([short.clone(), torch.zeros(3, 23), torch.zeros(3, 23)] for _ in range(2))
    step_(one, normal(3, 23, seed=1), 1, norm="max")
    step_(other, normal(3, 23, seed=1), 1, norm="none")
    assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("norm", ["none", "unit"])
def test_the_shadow_is_the_new_rows(norm, normal, error):
    state = [normal(5, 67), torch.zeros(5, 67), torch.zeros(5, 67)]
    shadow = torch.full((5, 67), math.nan, dtype=torch.bfloat16)
    step_(state, normal(5, 67, seed=1), 1, norm=norm, shadow=shadow)
    assert error(shadow, state[0].double()) < 1e-2  # the interpreter truncates


def test_a_row_of_zeros_stays_without_a_gradient():
    state = [torch.zeros(3, 23) for _ in range(3)]
    step_(state, torch.zeros(3, 23), 1, project=True, norm="unit", weight_decay=0.1)
    assert all((tensor == 0).all() for tensor in state)


def test_a_row_without_a_gradient_still_moves_by_its_momentum(normal):
    state = [normal(3, 23), normal(3, 23, seed=1), torch.ones(3, 23)]
    before = [tensor.clone() for tensor in state]
    step_(state, torch.zeros(3, 23), 5)
    assert torch.allclose(state[1], BETA1 * before[1], rtol=1e-6)
    assert ((state[0] - before[0]).sign() == -before[1].sign()).all()


def test_a_nan_in_a_gradient_stays_in_its_row(normal):
    state = [normal(3, 23), torch.zeros(3, 23), torch.zeros(3, 23)]
    grad = normal(3, 23, seed=1)
    grad[1, 5] = math.nan
    step_(state, grad, 1, project=True, norm="unit")
    assert state[0].isnan().any(1).tolist() == [False, True, False]


def test_the_gradient_is_not_written_to_and_runs_repeat(normal):
    grad = normal(3, 23, seed=1)
    results = []
    for _ in range(2):
        state = [normal(3, 23), torch.zeros(3, 23), torch.zeros(3, 23)]
        step_(state, grad, 1, project=True, norm="unit", clip=torch.tensor(0.5))
        results.append(state)
    assert torch.equal(grad, normal(3, 23, seed=1))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_no_rows_do_nothing_and_too_wide_ones_are_refused():
    step_([torch.empty(0, 23)] * 3, torch.empty(0, 23), 1)
    wide = torch.empty(1, blocks.MAX_ROW + 1)
    message = f"at most {blocks.MAX_ROW} columns with backend 'triton', got {blocks.MAX_ROW + 1}; "
    with pytest.raises(ValueError, match=message):
        step_([wide, wide, wide], wide, 1)
