"""Each fold leaves the function alone, and the same fold with one factor wrong does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sae.pretrained import DictionaryFormatError, rewrite
from sae.pretrained.canonical import Weights

D, F, D_OUT = 7, 23, 11
S_IN, S_OUT = 0.3, 1.9


@pytest.fixture
def weights(make):
    made = make(
        enc_rows=(F, D),
        dec_rows=(F, D_OUT),
        b_enc=F,
        b_dec=D_OUT,
        b_in=D,
        threshold=F,
        skip_rows=(D_OUT, D),
    )
    made["threshold"] = np.abs(made["threshold"])
    return Weights(**{name: torch.from_numpy(array) for name, array in made.items()})


def wide(weights):
    return {name: tensor.double().numpy() for name, tensor in weights.tensors().items()}


def apply(weights, x, act, gate=False, s_in=1.0, s_out=1.0):
    """The dictionary by its equations in float64: activations and output."""
    w = wide(weights)
    u = x * s_in
    n = np.linalg.norm(w["dec_rows"], axis=1) if gate else 1.0
    acts = act((((u - w["b_in"]) @ w["enc_rows"].T) + w["b_enc"]) * n, w.get("threshold")) / n
    return acts, (acts @ w["dec_rows"] + w["b_dec"] + u @ w["skip_rows"].T) / s_out


def differs(got, wanted) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def other_than_one(weights, name, factor):
    tensor = getattr(weights, name)
    shape = [-1] + [1] * (tensor.dim() - 1)
    factor = torch.as_tensor(factor).reshape(shape) if np.ndim(factor) else factor
    return replace(weights, **{name: (tensor * factor).float()})


def test_decoder_norms_under_a_threshold_on_h(weights, peer, rows):
    x, before = rows(D), apply(weights, rows(D), peer.jump)
    folded = rewrite.decoder_norm(weights)
    n = weights.dec_rows.norm(dim=1)
    assert torch.allclose(folded.dec_rows.norm(dim=1), torch.ones(F))
    acts, x_hat = apply(folded, x, peer.jump)
    assert differs(x_hat, before[1]) < 1e-6
    assert differs(acts, before[0] * n.double().numpy()) < 1e-6
    for name in ("enc_rows", "b_enc", "threshold", "dec_rows"):
        mutant = other_than_one(folded, name, n if name == "dec_rows" else 1 / n)
        assert differs(apply(mutant, x, peer.jump)[1], before[1]) > 0.01


def test_decoder_norms_of_a_gated_dictionary(weights, peer, rows, make):
    vectors = make(b_gate=F, b_mag=F, r_mag=F)
    parts = {name: torch.from_numpy(array) for name, array in vectors.items()}
    gated = replace(weights, b_enc=None, threshold=None, skip_rows=None, **parts)

    def output(given):
        w = wide(given)
        pi = (rows(D) - w["b_in"]) @ w["enc_rows"].T
        acts = (pi + w["b_gate"] > 0) * peer.relu(pi * np.exp(w["r_mag"]) + w["b_mag"])
        return acts @ w["dec_rows"] + w["b_dec"]

    folded, wanted = rewrite.decoder_norm(gated), output(gated)
    assert differs(output(folded), wanted) < 1e-6
    assert torch.equal(folded.r_mag, gated.r_mag)
    for name in ("b_gate", "b_mag"):
        assert differs(output(replace(folded, **{name: parts[name]})), wanted) > 0.01


@pytest.mark.parametrize("form", ["topk", "one threshold", "thresholds"])
def test_decoder_norms_by_which_the_activation_gates(weights, peer, rows, form):
    if form == "one threshold":
        weights = replace(weights, threshold=torch.tensor(2.5))
    act = (lambda h, _: peer.top_k(h, 5)) if form == "topk" else peer.jump
    x = rows(D)
    wanted = apply(weights, x, act, gate=True)[1]
    assert differs(apply(rewrite.decoder_norm_gate(weights), x, act)[1], wanted) < 1e-6
    # without the gate the fold that moves thresholds along is another function
    assert differs(apply(weights, x, act)[1], wanted) > 0.01
    if form != "topk":
        assert differs(apply(rewrite.decoder_norm(weights), x, act)[1], wanted) > 0.01


def test_decoder_norms_are_not_folded_under_a_plain_topk(weights, peer, rows):
    x = rows(D)

    def act(h, _):
        return peer.top_k(h, 5)

    assert (
        differs(apply(rewrite.decoder_norm(weights), x, act)[1], apply(weights, x, act)[1]) > 0.01
    )


def test_scales_that_keep_the_latents(weights, peer, rows):
    x = rows(D)
    # b_in is subtracted from u and the skip reads u, so both are in the trained units
    wanted = apply(weights, x, peer.jump, s_in=S_IN, s_out=S_OUT)
    folded = rewrite.scales_keeping_latents(weights, S_IN, S_OUT)
    acts, x_hat = apply(folded, x, peer.jump)
    assert differs(acts, wanted[0]) < 1e-6
    assert differs(x_hat, wanted[1]) < 1e-6
    mutants = {"enc_rows": 1 / S_IN, "b_in": S_IN, "dec_rows": S_OUT, "b_dec": S_OUT}
    for name, factor in (mutants | {"skip_rows": 1 / S_IN}).items():
        mutant = other_than_one(folded, name, factor)
        assert differs(apply(mutant, x, peer.jump)[1], wanted[1]) > 0.01


def test_scales_that_scale_the_latents(weights, peer, rows):
    x = rows(D)
    wanted = apply(weights, x, peer.jump, s_in=S_IN, s_out=S_OUT)
    folded = rewrite.scales_scaling_latents(weights, S_IN, S_OUT)
    acts, x_hat = apply(folded, x, peer.jump)
    assert differs(acts, wanted[0] / S_IN) < 1e-6
    assert differs(x_hat, wanted[1]) < 1e-6
    mutants = {"b_enc": S_IN, "b_in": S_IN, "dec_rows": S_OUT / S_IN, "b_dec": S_OUT}
    # a threshold that is left as it is was a release's own mistake
    for name, factor in (mutants | {"threshold": S_IN, "skip_rows": S_OUT}).items():
        mutant = other_than_one(folded, name, factor)
        assert differs(apply(mutant, x, peer.jump)[1], wanted[1]) > 0.01


def test_thresholds_below_0(weights, rows, peer):
    lowered = replace(weights, threshold=weights.threshold - 1)
    done = []
    raised = rewrite.threshold_of_relu(lowered, done)
    assert done == ["thresholds below 0 raised to 0"]

    def ours(h, threshold):
        return h * (h > threshold)

    x = rows(D)
    wanted = apply(lowered, x, peer.jump)[0]
    assert differs(apply(raised, x, ours)[0], wanted) < 1e-12
    assert differs(apply(lowered, x, ours)[0], wanted) > 0.01


def test_one_threshold_for_all_and_logarithms(weights):
    assert rewrite.one_threshold_for_all(weights, 0.25).threshold.tolist() == [0.25] * F
    assert rewrite.exp(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([1, 2.7182817])


def test_a_direction_of_length_0_is_refused(weights):
    weights.dec_rows[4] = 0
    with pytest.raises(DictionaryFormatError, match="got 0 for latent 4"):
        rewrite.decoder_norm(weights)
