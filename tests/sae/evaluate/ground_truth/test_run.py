from dataclasses import replace

import pytest
import torch

from sae.architecture import SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.evaluate import ground_truth
from sae.evaluate.ground_truth.config import TIERS
from sae.evaluate.ground_truth.run import evaluate
from sae.evaluate.ground_truth.world import make_world


@pytest.mark.parametrize("input_scale", [1.0, 2.5])
def test_a_perfect_dictionary_scores_1(easy, perfect, input_scale):
    report = evaluate(perfect(make_world(easy, 3), input_scale), make_world(easy, 3))
    assert report.directions.mcc == pytest.approx(1, abs=1e-6)
    assert report.directions.mmcs == pytest.approx(1, abs=1e-6)
    assert (report.directions.recovered, report.directions.uniqueness) == (1.0, 1.0)
    # An activation below 0.01 would be missed, so nearly 1.
    assert report.firing.f1 == pytest.approx(1, abs=2e-3)
    assert report.f1_nearest == report.firing.f1
    assert report.fvu < 1e-4
    assert report.shrinkage == pytest.approx(1, abs=0.01)
    assert report.l0 == pytest.approx(report.l0_true, abs=0.01)
    assert (report.dead, report.n_rows, report.n_features, report.d_sae) == (0, 3001, 13, 13)


def test_a_perfect_dictionary_of_another_seed_is_chance(easy, perfect):
    report = evaluate(perfect(make_world(easy, 3)), make_world(easy, 4))
    assert report.directions.recovered == 0
    assert report.directions.mcc == pytest.approx(report.chance_directions.mcc, abs=0.08)
    assert report.fvu > 0.5


def test_permuted_and_rescaled_latents_score_the_same(easy, perfect, dictionary_of):
    world = make_world(easy, 3)
    plain = perfect(world)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    scale = torch.linspace(1, 2, 13)[:, None]
    other = dictionary_of(
        (plain.enc_rows * scale)[order], (plain.dec_rows / scale)[order], world.bias
    )
    result, expected = evaluate(other, make_world(easy, 3)), evaluate(plain, make_world(easy, 3))
    assert result.directions.mcc == pytest.approx(expected.directions.mcc, abs=1e-6)
    assert result.directions.recovered == expected.directions.recovered
    assert result.firing.f1 == pytest.approx(expected.firing.f1, abs=2e-3)
    assert result.fvu == pytest.approx(expected.fvu, abs=1e-4)


def test_a_split_feature_lowers_f1_and_uniqueness_but_not_mcc(easy, perfect, dictionary_of):
    """Two latents share feature 0: one for its strong activations, one for its weak ones."""
    world = make_world(easy, 3)
    plain = perfect(world)
    twice = [0, *range(13)]
    split = dictionary_of(plain.enc_rows[twice], plain.dec_rows[twice], world.bias)
    split.b_enc[0] = -float(world.mean[0])  # fires in about half of the rows
    split.dec_rows[1] += 1e-3  # the strong one is the nearer
    before, after = evaluate(plain, make_world(easy, 3)), evaluate(split, make_world(easy, 3))
    assert after.directions.mcc == pytest.approx(before.directions.mcc, abs=1e-4)
    assert after.directions.uniqueness == pytest.approx(13 / 14)
    # Recall 1/2 at precision 1 is an F1 of 2/3 for one of 13 features.
    assert before.firing.f1 - after.firing.f1 == pytest.approx(1 / 3 / 13, abs=0.004)
    assert before.firing.recall - after.firing.recall == pytest.approx(1 / 2 / 13, abs=0.004)
    assert after.firing.precision == pytest.approx(before.firing.precision, abs=1e-3)


def test_a_random_dictionary_scores_its_floor():
    ci = TIERS["ci"]
    config = SAEConfig(d_in=37, d_sae=211, activation=TopK(k=3))
    dictionary = SparseAutoencoder(config)
    initialise(dictionary, torch.Generator().manual_seed(5))
    report = evaluate(dictionary, make_world(ci, 0))
    for name, near in (("mcc", 0.01), ("mmcs", 0.01), ("recovered", 0.01), ("uniqueness", 0.08)):
        floor = getattr(report.chance_directions, name)
        assert getattr(report.directions, name) == pytest.approx(floor, abs=near), name
    assert 0.35 < report.chance_directions.mcc < 0.5
    # The matched latents read along their nearest features, so they beat shuffled pairs a little.
    assert report.chance_firing.f1 < report.firing.f1 < 0.2


def test_the_chance_floor_of_firing_is_that_of_independent_latents(easy, perfect):
    world = make_world(easy, 3)
    report = evaluate(perfect(world), make_world(easy, 3))
    assert report.chance_firing.f1 < 0.25 < 0.9 < report.firing.f1


def test_the_same_dictionary_gives_the_same_report(easy, perfect):
    dictionary = perfect(make_world(easy, 3))
    first = evaluate(dictionary, make_world(easy, 3))
    assert first == evaluate(dictionary, make_world(easy, 3))


def test_progress_counts_rows(easy, perfect):
    seen = []
    evaluate(
        perfect(make_world(easy, 3)), make_world(easy, 3), progress=lambda *args: seen.append(args)
    )
    assert seen[0] == (1024, 3001, "rows")
    assert seen[-1] == (3001, 3001, "rows")


def test_another_width_is_refused(easy, perfect):
    dictionary = perfect(make_world(easy, 3))
    with pytest.raises(ValueError, match=r"must have d_in = d_out = d_model=19, got \(17, 17\)"):
        evaluate(dictionary, make_world(replace(easy, d_model=19), 3))


def test_the_package_offers_its_names():
    assert {getattr(ground_truth, name) is not None for name in ground_truth.__all__} == {True}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ground_truth.nothing
