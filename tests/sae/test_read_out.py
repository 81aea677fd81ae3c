"""The refined read-out against a loop over rows and latents, its gradients, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch

from sae.architecture import (
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    ReLU,
    SAEConfig,
    Slice,
    TopK,
)
from sae.autoencoder import SparseAutoencoder
from sae.read_out import (
    LAST_STEP,
    NEAR,
    NEAR_AT_LEAST,
    STEP,
    WIDER,
    ReadOut,
    checked,
    require_refinable,
)

D_IN, D_SAE, ROWS = 7, 89, 29
ACTIVATIONS = (
    ReLU(), TopK(k=5), BatchTopK(k=5), GroupMax(k=1), JumpReLU(threshold=0.4), Gated(),
)  # fmt: skip


def filled(activation, **form) -> SparseAutoencoder:
    """Random weights; directions of unequal norms, an encoder that is nearly their transpose."""
    made = SparseAutoencoder(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, **form))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name != "threshold":
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        rows = torch.randn(D_SAE, D_IN, generator=generator)
        sizes = 0.5 + torch.rand(D_SAE, 1, generator=generator)
        made.dec_rows.copy_(rows / rows.norm(dim=1, keepdim=True) * sizes)
        noise = 0.1 * torch.randn(D_SAE, D_IN, generator=generator)
        made.enc_rows.copy_(made.dec_rows / sizes.square() * 0.6 + noise)
        if isinstance(activation, BatchTopK):
            assert made.threshold is not None
            made.threshold.fill_(0.5)
    tau = 0.1 + 0.4 * torch.rand(D_SAE, generator=generator)
    made.read_out = ReadOut(tau=tau, margin=0.7)
    return made


def rows(n=ROWS):
    return 2 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(8))


def activation_of(made, i, h):
    """The activation of latent i at the pre-activation h that fires."""
    if isinstance(made.config.activation, Gated):
        h = max(h * math.exp(float(made.r_mag[i])) + gated_shift(made, i), 0.0)
    return h / float(made.dec_rows[i].norm()) if made.config.gate_by_decoder_norm else h


def gated_shift(made, i):
    return float(made.b_mag[i]) - float(made.b_gate[i]) * math.exp(float(made.r_mag[i]))


def threshold_of(made, i):
    threshold = made.threshold
    if threshold is None:
        return 0.0
    return float(threshold[i] if threshold.dim() else threshold)


def firing(made, h, near, wider):
    """The latents that fire, by the activation's rule, among those that may."""
    activation = made.config.activation
    able = [i for i in near if h[i] > threshold_of(made, i)]
    if isinstance(activation, TopK):
        able.sort(key=lambda i: -h[i])
        able = able[: math.ceil(wider * activation.k)]
    return sorted(able)


def near_of(made, h):
    activation = made.config.activation
    if isinstance(activation, TopK):
        n = min(max(NEAR * activation.k, NEAR_AT_LEAST), D_SAE)
        return sorted(range(D_SAE), key=lambda i: -h[i])[:n]
    if isinstance(activation, GroupMax):
        return [max(range(D_SAE), key=lambda i: h[i])]
    return [i for i in range(D_SAE) if h[i] > threshold_of(made, i) - made.read_out.margin]


def by_hand(made, x):
    """Dense activations of one row, latent after latent."""
    D, u = made.dec_rows, made.scaled(x[None])[0]
    target = u * (made.config.scale_out / made.config.input_scale)
    weights = made.encoder()
    b_in = 0 if weights.b_in is None else weights.b_in
    h = [float((u - b_in) @ weights.enc_rows[i] + weights.b_enc[i]) for i in range(D_SAE)]

    def left(acts):
        return target - made.b_dec - sum((a * D[i] for i, a in acts.items()), torch.zeros(D_IN))

    near = near_of(made, h)
    acts = {i: activation_of(made, i, h[i]) for i in firing(made, h, near, 1.0)}
    more = left(acts) * STEP / (made.config.scale_out / made.config.input_scale)
    again = {i: h[i] + float(more @ weights.enc_rows[i]) for i in near}
    acts = {i: activation_of(made, i, again[i]) for i in firing(made, again, near, WIDER)}
    rest = left(acts)
    kept = {
        i: a
        for i, a in acts.items()
        if float(rest @ D[i]) / float(D[i].norm()) + a * float(D[i].norm())
        > float(made.read_out.tau[i])
    }
    rest = left(kept)
    dense = torch.zeros(D_SAE)
    for i, a in kept.items():
        dense[i] = max(a + LAST_STEP * float(rest @ D[i]) / float(D[i].norm()) ** 2, 0.0)
    return dense


def dense_of(latents):
    return torch.zeros(len(latents.values), D_SAE).scatter_add(1, latents.indices, latents.values)


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
@pytest.mark.parametrize(
    "form",
    [{}, {"input_scale": 0.3, "output_scale": 0.6}, {"input_norm": "layer_norm"}, {"b_in": "own"}],
    ids=["plain", "scales", "norm", "b_in"],
)
def test_equal_to_a_loop_over_rows_and_latents(activation, form):
    made, x = filled(activation, **form), rows()
    found = dense_of(made.encode(x, read_out="refined"))
    expected = torch.stack([by_hand(made, row) for row in x])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert 0 < int((expected != 0).sum()) < int((made.encode_dense(x) != 0).sum()) * 3
    assert not torch.equal(found, made.encode_dense(x))


@torch.no_grad()
def test_gates_by_the_decoders_norms_are_taken_out_again():
    made, x = filled(TopK(k=5), gate_by_decoder_norm=True), rows()
    expected = torch.stack([by_hand(made, row) for row in x])
    found = made.reading("refined").encode_dense(x)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_latents_are_canonical_in_any_axes_and_do_not_depend_on_the_batch():
    made, x = filled(JumpReLU(threshold=0.4)), rows(30)
    latents = made.encode(x.view(5, 6, D_IN), read_out="refined")
    flat = made.encode(x, read_out="refined")
    assert latents.values.shape[:2] == (5, 6)
    assert torch.equal(latents.values.flatten(0, 1), flat.values)
    firing_places = flat.values != 0
    assert bool((flat.indices[~firing_places] == 0).all())
    assert bool((flat.indices.diff(dim=1) >= 0).all())
    one = dense_of(made.encode(x[3:4], read_out="refined"))
    torch.testing.assert_close(one, dense_of(flat)[3:4], atol=1e-5, rtol=1e-5)
    assert made.encode(x[:0], read_out="refined").values.shape[0] == 0


@torch.no_grad()
def test_length_may_move_between_directions_and_activations():
    """|d| times 3 and the encoder a third of it: the same reconstruction, the same latents fire."""
    made, x = filled(ReLU()), rows()
    other = filled(ReLU())
    other.dec_rows *= 3
    other.enc_rows /= 3
    other.b_enc /= 3
    assert made.read_out is not None
    other.read_out = replace(made.read_out, margin=made.read_out.margin / 3)
    a, b = (dense_of(one.encode(x, read_out="refined")) for one in (made, other))
    torch.testing.assert_close(a / 3, b, atol=1e-5, rtol=1e-4)


def test_gradients_are_the_encoders_where_a_refined_latent_fires():
    made, x = filled(JumpReLU(threshold=0.4)), rows().requires_grad_()
    latents = made.encode(x, read_out="refined")
    weight = torch.randn(latents.values.shape, generator=torch.Generator().manual_seed(4))
    weight = weight * (latents.values != 0)
    got = torch.autograd.grad((latents.values * weight).sum(), [x, made.enc_rows, made.b_enc])
    h = (made.scaled(x) - made.b_dec) @ made.enc_rows.T + made.b_enc
    picked = (h.gather(1, latents.indices) * weight).sum()
    expected = torch.autograd.grad(picked, [x, made.enc_rows, made.b_enc])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_view_that_reads_refined_reconstructs_by_it_and_shares_parameters():
    made, x = filled(TopK(k=5)), rows()
    refined = made.reading("refined")
    latents = made.encode(x, read_out="refined")
    assert torch.equal(refined(x), made.decode(latents))
    assert not torch.equal(refined(x), made(x))
    assert torch.equal(refined.encode(x, read_out="linear").values, made.encode(x).values)
    assert refined.enc_rows is made.enc_rows
    assert made.read_by == "linear"


@pytest.mark.parametrize(
    ("form", "got"),
    [
        ({"skip": True}, "skip=True"),
        ({"d_out": 5, "b_in": "none"}, "d_out=5"),
        ({"input_norm": "rms", "undo_norm": False}, "undo_norm=False"),
        (
            {
                "inputs": (Slice(hook_point="a:out", width=D_IN),),
                "outputs": (Slice(hook_point="b:out", width=D_IN),),
            },
            "predicts b:out from a:out",
        ),
    ],
)
def test_what_does_not_predict_the_rows_it_reads_is_refused_in_one_line(form, got):
    config = SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=TopK(k=5), **form)
    with pytest.raises(ValueError, match=got) as refused:
        require_refinable(config)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=got):
        SparseAutoencoder(config).reading("refined")


@torch.no_grad()
def test_a_crosscoder_that_predicts_what_it_reads_is_read_so():
    parts = (Slice(hook_point="a:out", width=3, scale=0.5), Slice(hook_point="b:out", width=4))
    made, x = filled(ReLU(), inputs=parts), rows()
    found = dense_of(made.encode(x, read_out="refined"))
    expected = torch.stack([by_hand(made, row) for row in x])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_read_out_that_was_never_set_or_has_another_name_is_refused():
    made = SparseAutoencoder(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=TopK(k=5)))
    with pytest.raises(ValueError, match="sae refine"):
        made.encode(rows(), read_out="refined")
    with pytest.raises(ValueError, match="be one of 'linear', 'refined', got 'refine'"):
        checked("refine")
    with pytest.raises(ValueError, match=f"d_sae={D_SAE}, got 3"):
        made.read_out = ReadOut(tau=torch.zeros(3))
    with pytest.raises(ValueError, match="tau must be at least 0"):
        ReadOut(tau=torch.tensor([-1.0]))
