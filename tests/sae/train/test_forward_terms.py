"""Terms that several kinds have, nested k, group maxima and the controller, in float64."""

import math

import pytest
import torch

from sae.architecture import GroupMax, JumpReLU, ReLU, TopK
from sae.train.forward.common import Power, Rows
from sae.train.forward.run import forward
from sae.train.loss_config import L0, AuxK, Control, FixedPrefixes, NestedK
from tests.sae.train.formulas import (
    BATCH,
    D_IN,
    D_SAE,
    DEAD,
    ENDS,
    L1_NOW,
    Case,
    config,
    decoded,
    filled,
    grads_of,
    linear,
    moment,
    rows,
    sq,
    top,
)


def nested(d, u):
    """n, n - 1, ... down to 1 for 2, 3 and all 5 latents."""
    h = linear(d, u) + d.b_enc
    errors = [sq(u - decoded(d, top(h, k))) for k in (2, 3, 5)]
    return (3 * errors[0] + 2 * errors[1] + errors[2]) / 6


def group_max(d, u):
    """Of 29 groups of one latent each all fire, as with the ReLU."""
    return sq(u - decoded(d, torch.relu(linear(d, u) + d.b_enc)))


def aux(d, u, a, k, theta=0.0):
    """Of the dead ones the k largest pre-activations reconstruct what is left."""
    h = (u - d.b_dec.detach()) @ d.enc_rows.T + d.b_enc
    of_dead = top(h.masked_fill(~DEAD, -torch.inf), k).nan_to_num(0.0)
    return sq((u - decoded(d, a)).detach() - of_dead @ d.dec_rows)


def relu_whole(d, u):
    a = torch.relu(linear(d, u) + d.b_enc)
    error = sum(sq(u - decoded(d, a, end)) for end in (*ENDS, D_SAE)) / 4
    penalty = (a * d.dec_rows.norm(dim=1)).sum(1).mean()
    return error + 0.7 * 1.3 * penalty + 0.3 * aux(d, u, a, 2)


def jumprelu_whole(d, u):
    h = linear(d, u) + d.b_enc
    a = h * (h > d.threshold.detach())
    error = sum(sq(u - decoded(d, a, end)) for end in (*ENDS, D_SAE)) / 4
    penalty = 0.4 * 1.3 * ((a > 0).sum() / BATCH / 5.0 - 1).square()
    return error + penalty + 0.3 * aux(d, u, a, 2)


def relu_auxk(d, u):
    a = torch.relu(linear(d, u) + d.b_enc)
    penalty = (a * d.dec_rows.norm(dim=1)).sum(1).mean()
    return sq(u - decoded(d, a)) + 0.7 * 1.3 * penalty + 0.3 * aux(d, u, a, 3)


CASES = {
    "nested": Case(config(TopK(k=5), matryoshka=NestedK(ks=(2, 3), weights="reverse")), nested),
    "groupmax": Case(config(GroupMax(k=D_SAE)), group_max),
    "relu_whole": Case(
        config(
            ReLU(),
            l1=L1_NOW,
            matryoshka=FixedPrefixes(ends=ENDS),
            auxk=AuxK(coefficient=0.3, k=2),
        ),
        relu_whole,
    ),
    "jumprelu_whole": Case(
        config(
            JumpReLU(bandwidth=0.5),
            l0=L0(coefficient=0.4, target=5.0, ramp=0.0),
            matryoshka=FixedPrefixes(ends=ENDS),
            auxk=AuxK(coefficient=0.3, k=2),
        ),
        jumprelu_whole,
    ),
    "relu_auxk": Case(config(ReLU(), l1=L1_NOW, auxk=AuxK(coefficient=0.3, k=3)), relu_auxk),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
def test_loss_and_gradients_equal_the_formula(case):
    dictionary, u = filled(case.config), rows()
    got = forward(dictionary, case.config, Rows(u, u), moment()).loss
    expected = case.loss(dictionary, u)
    torch.testing.assert_close(got, expected)
    by_name = grads_of(expected, dictionary, without=("threshold",))
    for name, grad in grads_of(got, dictionary, without=("threshold",)).items():
        torch.testing.assert_close(grad, by_name[name], msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("target", [1.0, float(D_SAE)])
def test_a_controller_moves_the_weight_towards_its_target(target):
    plain = config(ReLU(), l1=L1_NOW)
    dictionary, u = filled(plain), rows()
    held = config(ReLU(), l1=L1_NOW, control=Control(target=target, rate=0.25, first=target))
    one = forward(dictionary, plain, Rows(u, u), moment())
    other = forward(dictionary, held, Rows(u, u), moment())
    assert torch.equal(one.loss, other.loss)
    assert one.power is None
    factor = min(float(one.l0) / target - 1, 1.0)
    assert (factor > 0) == (target == 1.0)
    assert other.power == pytest.approx(Power(0.75, 1.3 * math.exp(0.25 * factor)), rel=1e-4)
    at_it = Control(target=(t := float(one.l0) / 1.1), rate=0.25, first=t)
    near = config(ReLU(), l1=L1_NOW, control=at_it)
    moved = forward(dictionary, near, Rows(u, u), moment()).power
    assert moved == pytest.approx(Power(0.75, 1.3 * math.exp(0.25 * 0.1)), rel=1e-4)


@pytest.mark.parametrize(("under", "over", "speed"), [(3.0, 1.5, 1.0), (64 / 1.5, 1.5, 1.5)])
def test_a_controller_aims_high_first(under, over, speed):
    """At step 3 of 10 it is as far down as 3 of 7 steps bring it; a steep fall moves faster."""
    plain = config(ReLU(), l1=L1_NOW)
    dictionary, u = filled(plain), rows()
    l0 = float(forward(dictionary, plain, Rows(u, u), moment()).l0)
    control = Control(target=l0 / under, first=l0 * over, rate=0.25)
    aims = config(ReLU(), l1=L1_NOW, control=control)
    moved = forward(dictionary, aims, Rows(u, u), moment()).power
    factor = min(under / (over * under) ** (4 / 7) - 1, 1.0)
    assert (factor < 1) == (speed == 1.0)
    assert moved == pytest.approx(Power(0.75, 1.3 * math.exp(0.25 * speed * factor)), rel=1e-4)


def test_a_controller_aims_at_as_many_latents_as_dimensions_first():
    plain = config(ReLU(), l1=L1_NOW)
    dictionary, u = filled(plain), rows()
    dims = min(D_IN, D_SAE / 4)
    target = float(forward(dictionary, plain, Rows(u, u), moment()).l0) / 1.2

    def moved(first):
        aims = config(ReLU(), l1=L1_NOW, control=Control(target=target, rate=0.1, first=first))
        return forward(dictionary, aims, Rows(u, u), moment()).power

    assert moved(None) == moved(max(target, dims)) != moved(1.1 * max(target, dims))


@pytest.mark.parametrize("coefficient", [None, 5.0])
def test_an_l0_penalty_that_aims_is_as_stiff_as_the_rows_are_wide(coefficient):
    aims = config(JumpReLU(), l0=L0(target=2.0, ramp=0.0, coefficient=coefficient))
    free = config(JumpReLU(), l0=L0(ramp=0.0, coefficient=0.0))
    dictionary, u = filled(aims), rows()
    aimed, without = (forward(dictionary, c, Rows(u, u), moment()) for c in (aims, free))
    weight = 1.3 * (coefficient or 4 * D_IN)
    expected = weight * (float(aimed.l0) / 2 - 1) ** 2
    assert float((aimed.loss - without.loss).detach()) == pytest.approx(expected)
