import pytest
import torch

from sae.architecture import JumpReLU, ReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import Adam, DictionaryConfig
from sae.train.loss_config import L0, L1, AuxK
from sae.train.step import TrainStep
from sae.train.weights import NEAR, keep_near_

FORMS = {
    "topk": {"activation": TopK(k=3), "auxk": AuxK(coefficient=0.5), "dead_after_tokens": 150},
    "relu": {"activation": ReLU(), "l1": L1(coefficient=0.1), "unit_norm": False},
    "jumprelu": {"activation": JumpReLU(), "l0": L0(coefficient=0.1)},
}


def step_of(form, frozen):
    config = DictionaryConfig(
        d_sae=31, frozen=frozen, optimizer=Adam(lr=0.1, decay=0.0, warmup=0.0), **form
    )
    autoencoder = SparseAutoencoder(config.architecture(13, 1.0))
    initialise(autoencoder, torch.Generator().manual_seed(0))
    return TrainStep(autoencoder, config, total_steps=1000)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_frozen_encoder_never_moves_and_the_rest_learns(planted, form):
    step = step_of(form, "encoder")
    before = {n: p.detach().clone() for n, p in step.autoencoder.named_parameters()}
    for x in planted(5):
        step(x)
    after = dict(step.autoencoder.named_parameters())
    assert torch.equal(after["enc_rows"], before["enc_rows"])
    assert not torch.equal(after["dec_rows"], before["dec_rows"])
    assert not torch.equal(after["b_enc"], before["b_enc"])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_soft_decoder_moves_up_to_its_bound(planted, form):
    soft, free = step_of(form, "soft_decoder"), step_of(form, "none")
    first = torch.nn.functional.normalize(free.autoencoder.W_dec.clone())
    for x in planted(31):
        soft(x)
        free(x)
    near, far = (torch.cosine_similarity(step.autoencoder.W_dec, first) for step in (soft, free))
    assert float(far.min()) < NEAR - 0.1
    assert float(near.min()) == pytest.approx(NEAR, abs=1e-4)
    if soft.config.unit_norm:
        assert torch.allclose(soft.autoencoder.W_dec.norm(dim=1), torch.ones(31), atol=1e-5)


def test_turning_back_keeps_norms_and_what_is_near():
    anchor = torch.eye(3, 5)
    rows = torch.tensor([[3.0, 0, 0, 0, 0], [0, 1, 2, 0, 0], [0, 0, -2, 0, 0.1]])
    kept = rows.clone()
    keep_near_(kept, anchor)
    assert torch.equal(kept[0], rows[0])
    assert torch.allclose(kept.norm(dim=1), rows.norm(dim=1))
    cosine = torch.cosine_similarity(kept, anchor)
    assert cosine.tolist() == pytest.approx([1, NEAR, NEAR], abs=1e-6)
    assert float(kept[1, 2]) == pytest.approx(0.6 * 5**0.5)  # to the side that it strayed to


def test_a_resumed_soft_decoder_goes_on_bit_by_bit(planted):
    data = planted(6)
    whole, first, second = (step_of(FORMS["topk"], "soft_decoder") for _ in range(3))
    for x in data:
        whole(x)
    for x in data[:3]:
        first(x)
    second.anchor.zero_()  # what it has of its own must not matter
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for x in data[3:]:
        second(x)
    ours, expected = second.state_dict(), whole.state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
