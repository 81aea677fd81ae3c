"""How a refined read-out is set from rows, and the linear encoder that learns from it."""

import pytest
import torch

from sae.architecture import BatchTopK, JumpReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.ground_truth import TIERS, evaluate, make_world
from sae.evaluate.ground_truth.scores import set_true_decoder
from sae.evaluate.ground_truth.world import rows as rows_of
from sae.run.read_outs import distilled, figures, fit_read_out, usual_lengths, valley

K, N = 7, 6000


@pytest.fixture(scope="module")
def world():
    return make_world(TIERS["planted"], 0)


@pytest.fixture(scope="module")
def x(world):
    return rows_of(world, 0, N).x


def of_truth(world, activation) -> SparseAutoencoder:
    """The world's directions, read linearly by themselves: too many latents fire."""
    config = SAEConfig(d_in=96, d_sae=world.n_features, activation=activation)
    made = SparseAutoencoder(config).requires_grad_(False)
    set_true_decoder(made, world)
    if isinstance(activation, BatchTopK):
        assert made.threshold is not None
        made.threshold.fill_(0.65)
    return made


@pytest.mark.parametrize("activation", [TopK(k=K), BatchTopK(k=K)], ids=lambda a: a.kind)
def test_it_tells_more_of_what_is_there_without_the_truth(world, x, activation):
    made = of_truth(world, activation)
    made.read_out = fit_read_out(made, x)
    plain, refined = (evaluate(one, world) for one in (made, made.reading("refined")))
    assert "valley" in made.read_out.made_from["rule"]
    assert refined.firing.f1 > plain.firing.f1 + 0.1
    assert refined.firing.precision > 0.95
    assert refined.fvu < plain.fvu / 2
    assert refined.l0 < 7.2


def test_where_lengths_do_not_part_the_number_of_latents_is_kept():
    """On rows without any features nothing says which latents are too many."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 37, generator=generator)
    made = SparseAutoencoder(SAEConfig(d_in=37, d_sae=149, activation=TopK(k=8)))
    directions = torch.randn(149, 37, generator=generator)
    made.requires_grad_(False).dec_rows.copy_(directions / directions.norm(dim=1, keepdim=True))
    made.enc_rows.copy_(made.dec_rows * 0.5)
    made.read_out = fit_read_out(made, x)
    found = figures(made, x)
    assert "as many latents" in made.read_out.made_from["rule"]
    assert found["refined"].l0 == pytest.approx(found["linear"].l0, rel=0.02)
    assert found["refined"].fvu < found["linear"].fvu


def test_the_valley_lies_between_two_heaps_and_nowhere_in_one():
    generator = torch.Generator().manual_seed(1)
    low = 0.5 * torch.randn(20_000, generator=generator).abs()
    high = 5 + 0.7 * torch.randn(20_000, generator=generator)
    found = valley(torch.cat([low, high]))
    assert found is not None
    assert 1.5 < found < 3.5
    assert valley(low) is None
    assert valley(low[:5]) is None
    a_few_far_away = torch.cat([low[:2000], 6 + 0.1 * high[:9]])
    assert valley(a_few_far_away) is None


def test_a_latent_with_few_lengths_has_the_usual_one_of_the_others():
    lengths = torch.tensor([0.5] * 10 + [4.0] * 10 + [2.0] * 10 + [9.0])
    latents = torch.tensor([0] * 10 + [0] * 10 + [1] * 10 + [2])
    assert usual_lengths(lengths, latents, 1.0, 4).tolist() == [4.0, 2.0, 3.0, 3.0]


def test_rows_that_it_does_not_reconstruct_are_refused(world, x):
    made = of_truth(world, TopK(k=K))
    with pytest.raises(ValueError, match="FVU below 1") as refused:
        fit_read_out(made, torch.randn(N, 96) + 3)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="at least 2"):
        fit_read_out(made, x[:1])


def test_a_distilled_encoder_is_linear_and_keeps_part_of_the_gain(world, x):
    made = of_truth(world, BatchTopK(k=K))
    made.read_out = fit_read_out(made, x)
    student = distilled(made, x, steps=20)
    assert isinstance(student.config.activation, JumpReLU)
    assert torch.equal(student.dec_rows, made.dec_rows)
    assert torch.equal(distilled(made, x, steps=20).enc_rows, student.enc_rows)
    f1 = {
        name: evaluate(one, world).firing.f1
        for name, one in (("linear", made), ("refined", made.reading("refined")), ("new", student))
    }
    assert f1["linear"] + 0.03 < f1["new"] < f1["refined"]
