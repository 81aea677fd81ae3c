from dataclasses import replace

import pytest
import torch

from sae.architecture import SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.ground_truth.config import TIERS, GroundTruthConfig, Zipf
from sae.evaluate.ground_truth.run import evaluate
from sae.evaluate.ground_truth.scores import measure_ceilings, set_true_decoder
from sae.evaluate.ground_truth.world import make_world


def test_probes_read_independent_directions_without_error(easy):
    ceilings = measure_ceilings(make_world(easy, 3), k=13)
    assert ceilings.probe.f1 > 0.995
    assert ceilings.oracle_fvu < 1e-9


def test_superposition_and_noise_keep_probes_below_1(easy):
    crowded = replace(easy, d_model=7)
    noisy = replace(easy, noise=3.0)
    assert 0.2 < measure_ceilings(make_world(crowded, 3), k=13).probe.f1 < 0.95
    assert 0.2 < measure_ceilings(make_world(noisy, 3), k=13).probe.f1 < 0.95


def test_the_oracle_loses_what_k_leaves_out(easy):
    world = make_world(easy, 3)
    fvu = [measure_ceilings(world, k=k).oracle_fvu for k in (1, 2, 4, 13)]
    assert fvu == sorted(fvu, reverse=True)
    assert fvu[0] > 0.3
    assert fvu[3] < 1e-9


def test_only_the_most_frequent_features_are_asked_for(easy):
    seen = []
    world = make_world(easy, 3)
    some = measure_ceilings(world, k=13, n_features=5, progress=lambda *at: seen.append(at))
    assert some.oracle_fvu > 0.1
    assert some.probe.f1 > 0.995
    done, totals, units = zip(*seen, strict=True)
    assert done == tuple(range(1, totals[0] + 1))
    assert ({*totals}, {*units}) == ({totals[0]}, {"batches"})


def test_the_true_decoder_scores_1_in_direction_and_its_encoder_does_not():
    ci = replace(TIERS["ci"], n_rows=3001)
    world = make_world(ci, 0)
    config = SAEConfig(d_in=37, d_sae=211, activation=TopK(k=3), input_scale=0.5)
    dictionary = SparseAutoencoder(config)
    set_true_decoder(dictionary, world)
    torch.testing.assert_close(dictionary.b_dec.detach() / 0.5, world.bias)
    report = evaluate(dictionary.requires_grad_(False), world)
    assert report.directions.mcc == pytest.approx(1, abs=1e-6)
    assert report.directions.recovered == report.directions.uniqueness == 1
    assert report.chance_firing.f1 + 0.2 < report.firing.f1 < 0.95


def test_a_true_decoder_has_at_most_all_features(easy):
    dictionary = SparseAutoencoder(SAEConfig(d_in=17, d_sae=14, activation=TopK(k=3)))
    with pytest.raises(ValueError, match="d_sae must be at most n_features=13"):
        set_true_decoder(dictionary, make_world(easy, 0))


def test_probes_are_scored_on_rows_that_they_were_not_fitted_to():
    # As many dimensions as rows and nothing but noise: any labels fit, and none of it is true.
    noise = GroundTruthConfig(
        n_features=3,
        d_model=211,
        firing=Zipf(exponent=0.0, highest=0.2, lowest=0.2),
        noise=1000.0,
        n_rows=199,
    )
    # Calling every row is right in a fifth of them: F1 = 2 * 0.2 / 1.2.
    assert measure_ceilings(make_world(noise, 0), k=3).probe.f1 < 0.5
