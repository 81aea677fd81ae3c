"""Each loss and its gradients against the formula written out, in float64."""

import pytest
import torch

from sae.activations import to_dense
from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU, TopK
from sae.train.forward.common import Power, Rows, prefix_ends
from sae.train.forward.run import forward
from sae.train.loss_config import (
    L0,
    AuxK,
    Control,
    FixedPrefixes,
    KAnneal,
    MultiTopK,
    PAnneal,
    PreAct,
    RandomPrefixes,
    Tanh,
)
from tests.sae.train.formulas import (
    BATCH,
    D_SAE,
    DEAD,
    ENDS,
    L1_NOW,
    STEP,
    Case,
    K,
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


def multi_topk(d, u):
    h = linear(d, u) + d.b_enc
    return sq(u - decoded(d, top(h, K))) + sq(u - decoded(d, top(h, 4 * K))) / 8


def matryoshka(d, u):
    a = top(linear(d, u) + d.b_enc, K)
    return sum(sq(u - decoded(d, a, end)) for end in (*ENDS, D_SAE)) / 4


def falling_matryoshka(d, u):
    """At step 3 of 10 a weight that falls to 0 at 6 is at a half."""
    whole = sq(u - decoded(d, top(linear(d, u) + d.b_enc, K)))
    return matryoshka(d, u) / 2 + whole / 2


def falling_relu(d, u):
    a = torch.relu(linear(d, u) + d.b_enc)
    errors = [sq(u - decoded(d, a, end)) for end in (*ENDS, D_SAE)]
    penalty = (a * d.dec_rows.norm(dim=1)).sum(1).mean()
    return sum(errors) / 8 + errors[-1] / 2 + 0.7 * 1.3 * penalty


def ended_matryoshka(d, u):
    return sq(u - decoded(d, top(linear(d, u) + d.b_enc, K)))


def random_matryoshka(d, u):
    a = top(linear(d, u) + d.b_enc, K)
    ends = prefix_ends(RandomPrefixes(n=5, seed=4), D_SAE, STEP)
    assert len(ends) > 2
    return sum(sq(u - decoded(d, a, end)) for end in ends) / len(ends)


def batch_topk(d, u):
    """Gates by the decoder's norms, and the dead ones reconstruct the residual."""
    norms = d.dec_rows.norm(dim=1)
    g = (linear(d, u) + d.b_enc) * norms
    kth = g.flatten().sort(descending=True).values[K * BATCH - 1]
    a = torch.relu(g) * (g >= kth) / norms
    ends = (*ENDS, D_SAE)
    error = sum(sq(u - decoded(d, a, end)) for end in ends) / 4
    b_dec = d.b_dec.detach()
    of_dead = ((u - b_dec) @ d.enc_rows.T + d.b_enc) * norms
    of_dead = top(of_dead.masked_fill(~DEAD, -torch.inf), 2).nan_to_num(0.0)
    guess = (of_dead / norms) @ d.dec_rows
    return error + 0.3 * sq((u - decoded(d, a)).detach() - guess)


def annealed(d, u):
    """After 3 of 8 annealing steps from 11 to 3, k is 8."""
    return sq(u - decoded(d, top(linear(d, u) + d.b_enc, 8)))


def relu_by_norm(d, u):
    a = torch.relu(linear(d, u) + d.b_enc)
    return sq(u - decoded(d, a)) + 0.7 * 1.3 * (a * d.dec_rows.norm(dim=1)).sum(1).mean()


def p_anneal(d, u):
    """At step 3 of 10, after 2, one of two jumps from 1 to 0.5 is done: p is 0.75, as before."""
    a = torch.relu(linear(d, u) + d.b_enc)
    sizes = (a * d.dec_rows.norm(dim=1))[a > 0]
    return sq(u - decoded(d, a)) + 0.7 * 1.3 * (sizes**0.75).sum() / BATCH


def tanh(d, u):
    """The ramp is at 4 of 5 steps; beside it the dead latents' distance to their thresholds."""
    h, norms, theta = linear(d, u) + d.b_enc, d.dec_rows.norm(dim=1), d.threshold.detach()
    a = h * (h > theta)
    penalty = torch.tanh(4 * a * norms).sum(1).mean()
    distance = (torch.relu(d.threshold - h) * norms)[:, DEAD].sum(1).mean()
    return sq(u - decoded(d, a)) + 2.0 * 0.8 * 1.3 * penalty + 0.05 * distance


def gated(d, u):
    pi = linear(d, u)
    a = torch.relu(pi * d.r_mag.exp() + d.b_mag) * (pi + d.b_gate > 0)
    gates = torch.relu(pi + d.b_gate)
    penalty = (gates * d.dec_rows.norm(dim=1)).sum(1).mean()
    guess = gates @ d.dec_rows.detach() + d.b_dec.detach()
    return sq(u - decoded(d, a)) + 0.7 * 1.3 * penalty + sq(u - guess)


def revived_gates(d, u):
    """The dead ones read rows without the biases of their gates."""
    pi = (u - d.b_in.detach()) @ d.enc_rows.T
    of_dead = top(pi.masked_fill(~DEAD, -torch.inf), 2).nan_to_num(0.0)
    missing = (u - d(u)).detach()
    return gated(d, u) + 0.3 * sq(missing - of_dead @ d.dec_rows)


CASES = {
    "multi_topk": Case(config(TopK(k=K), multi_topk=MultiTopK()), multi_topk),
    "matryoshka": Case(config(TopK(k=K), matryoshka=FixedPrefixes(ends=ENDS)), matryoshka),
    "falling": Case(
        config(TopK(k=K), matryoshka=FixedPrefixes(ends=ENDS, until=0.6)), falling_matryoshka
    ),
    "falling_relu": Case(
        config(ReLU(), l1=L1_NOW, matryoshka=FixedPrefixes(ends=ENDS, until=0.6)), falling_relu
    ),
    "ended": Case(
        config(TopK(k=K), matryoshka=FixedPrefixes(ends=ENDS, until=0.3)), ended_matryoshka
    ),
    "random": Case(
        config(TopK(k=K), b_in="own", matryoshka=RandomPrefixes(n=5, seed=4)), random_matryoshka
    ),
    "batch_topk": Case(
        config(
            BatchTopK(k=K),
            gate_by_decoder_norm=True,
            matryoshka=FixedPrefixes(ends=ENDS),
            auxk=AuxK(coefficient=0.3, k=2),
        ),
        batch_topk,
    ),
    "annealed": Case(config(TopK(k=K), k_anneal=KAnneal(start=11, until=0.8)), annealed),
    "relu": Case(config(ReLU(), l1=L1_NOW, b_in="none", gate_by_decoder_norm=True), relu_by_norm),
    "p_anneal": Case(
        config(ReLU(), p_anneal=PAnneal(coefficient=0.7, ramp=0.0, p=0.5, n=2, start=0.2)), p_anneal
    ),
    "tanh": Case(
        config(
            JumpReLU(bandwidth=0.5),
            tanh=Tanh(coefficient=2.0, ramp=0.5),
            preact=PreAct(coefficient=0.05),
        ),
        tanh,
    ),
    "gated": Case(config(Gated(), l1=L1_NOW), gated),
    "controlled": Case(config(ReLU(), l1=L1_NOW, control=Control(target=3.0)), relu_by_norm),
    "controlled_gates": Case(config(Gated(), l1=L1_NOW, control=Control(target=3.0)), gated),
    "revived": Case(
        config(Gated(), l1=L1_NOW, b_in="own", auxk=AuxK(coefficient=0.3, k=2)), revived_gates
    ),
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


@every_case
def test_what_fired_and_the_error_are_those_of_the_whole_dictionary(case):
    dictionary, u = filled(case.config), rows()
    found = forward(dictionary, case.config, Rows(u, u), moment())
    if case.config.activation == BatchTopK(k=K):
        dictionary.threshold.fill_(float(found.threshold) * (1 - 1e-9))
    if case.config.k_anneal is not None:
        assert float(found.l0) > K
        return
    acts = dictionary.encode_dense(u)
    torch.testing.assert_close(found.error, sq(u - decoded(dictionary, acts)))
    assert found.n_fired.tolist() == (acts > 0).sum(dim=0).tolist()
    assert float(found.l0) == pytest.approx(float((acts > 0).sum()) / BATCH)
    assert not found.l0.requires_grad


def test_where_p_falls_the_penalty_of_that_batch_stays_as_large_as_it_was():
    case = CASES["p_anneal"]
    dictionary, u = filled(case.config), rows()
    before = moment()._replace(power=Power(1.0, 1.3))
    found = forward(dictionary, case.config, Rows(u, u), before)
    sizes = dictionary.encode_dense(u) * dictionary.dec_rows.norm(dim=1)
    torch.testing.assert_close(found.loss - found.error, 0.7 * 1.3 * sizes.sum(1).mean())
    assert found.power is not None
    assert found.power.p == 0.75
    after = forward(dictionary, case.config, Rows(u, u), before._replace(power=found.power))
    assert after.power == found.power
    torch.testing.assert_close(after.loss, found.loss)


def test_thresholds_learn_from_the_tanh_penalty_and_from_the_error():
    case = CASES["tanh"]
    dictionary, u = filled(case.config), rows()
    loss = forward(dictionary, case.config, Rows(u, u), moment()).loss
    [found] = torch.autograd.grad(loss, [dictionary.threshold])
    theta, norms = dictionary.threshold.detach(), dictionary.dec_rows.norm(dim=1)
    h = (linear(dictionary, u) + dictionary.b_enc).detach()
    a = (h * (h > theta)).requires_grad_()
    sparsity = 2.0 * 0.8 * 1.3 * torch.tanh(4 * a * norms).sum(1).mean()
    [d_acts] = torch.autograd.grad(sq(u - decoded(dictionary, a)) + sparsity, [a])
    near = (h - theta).abs() < 0.25
    assert (near & (h < theta)).any()
    assert (near & (h > theta)).any()
    pulled = 0.05 * ((theta > h) * norms * DEAD).sum(0) / BATCH
    torch.testing.assert_close(found, -(d_acts * near * theta / 0.5).sum(0) + pulled)


@pytest.mark.parametrize("terms", [{"l0": L0(coefficient=0.4, target=5.0, ramp=0.0)}])
def test_by_hand_and_by_autograd_jumprelu_has_the_same_gradients(terms):
    plain = config(JumpReLU(bandwidth=0.5), **terms)
    composed = config(JumpReLU(bandwidth=0.5), preact=PreAct(coefficient=0.0), **terms)
    dictionary, u = filled(plain), rows()
    one = forward(dictionary, plain, Rows(u, u), moment())
    other = forward(dictionary, composed, Rows(u, u), moment())
    torch.testing.assert_close(one.loss, other.loss)
    by_name = grads_of(other.loss, dictionary)
    assert by_name["threshold"].abs().max() > 0
    for name, grad in grads_of(one.loss, dictionary).items():
        torch.testing.assert_close(grad, by_name[name])


def test_multi_topk_keeps_the_latents_that_topk_alone_keeps():
    case = CASES["multi_topk"]
    dictionary, u = filled(case.config), rows()
    alone = config(TopK(k=K))
    one, other = (forward(dictionary, c, Rows(u, u), moment()) for c in (case.config, alone))
    torch.testing.assert_close(one.error, other.error, rtol=0, atol=0)
    assert torch.equal(one.n_fired, other.n_fired)
    assert to_dense(dictionary.encode(u), D_SAE).count_nonzero() == float(other.l0) * BATCH


def test_a_latent_whose_gate_is_shut_in_every_row_has_no_gradient():
    case = CASES["gated"]
    dictionary, u = filled(case.config), rows()
    loss = forward(dictionary, case.config, Rows(u, u), moment()).loss
    by_name = grads_of(loss, dictionary)
    assert all(grad.abs().max() > 0 for grad in by_name.values())
    with torch.no_grad():
        dictionary.b_gate[4] = -100.0
    shut = grads_of(forward(dictionary, case.config, Rows(u, u), moment()).loss, dictionary)
    assert all(shut[n][4].abs().max() == 0 for n in ("b_gate", "b_mag", "r_mag", "enc_rows"))
