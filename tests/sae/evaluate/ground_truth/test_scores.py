import pytest
import torch

from sae.evaluate.ground_truth.scores import (
    FiringCounts,
    Pairs,
    cosines,
    direction_scores,
    matched,
    nearest,
)


def unit_rows(n, d, seed=0):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def scores_of(truth, dec_rows):
    cosine = cosines(truth, dec_rows)
    return direction_scores(cosine, matched(cosine))


def test_the_truth_scores_1():
    truth = unit_rows(53, 11)
    scores = scores_of(truth, truth)
    assert scores.mcc == pytest.approx(1, abs=1e-6)
    assert scores.mmcs == pytest.approx(1, abs=1e-6)
    assert (scores.recovered, scores.uniqueness) == (1.0, 1.0)


def test_order_and_length_of_latents_do_not_count():
    truth, dec_rows = unit_rows(53, 11), unit_rows(41, 11, seed=1)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(2))
    scale = torch.rand(41, 1, generator=torch.Generator().manual_seed(3)) + 0.1
    plain, other = scores_of(truth, dec_rows), scores_of(truth, (dec_rows * scale)[order])
    for name in ("mcc", "mmcs", "recovered", "uniqueness"):
        assert getattr(other, name) == pytest.approx(getattr(plain, name), abs=1e-6), name


def test_a_flipped_latent_keeps_its_mcc_and_recovers_nothing():
    truth = torch.eye(7)
    scores = scores_of(truth, -truth)
    assert (scores.mcc, scores.uniqueness) == (1.0, 1.0)
    assert (scores.mmcs, scores.recovered) == (0.0, 0.0)


def test_duplicates_lower_uniqueness_and_what_is_missing_lowers_the_others():
    truth = torch.eye(7)
    scores = scores_of(truth, truth[[0, 0, 0, 1, 2, 3, 4]])
    assert scores.uniqueness == pytest.approx(5 / 7)
    assert scores.recovered == scores.mmcs == scores.mcc == pytest.approx(5 / 7)


def test_mcc_is_one_to_one_where_mmcs_is_not():
    # Both features are nearest to latent 0; only one of them may have it.
    truth = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    dec_rows = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    scores = scores_of(truth, dec_rows)
    assert scores.mcc == pytest.approx((1 + 0.6) / 2)
    assert scores.mmcs == pytest.approx((1 + 0.8) / 2)
    assert scores.recovered == 0.5


def test_a_dead_latent_without_direction_counts_0():
    truth = torch.eye(3)
    scores = scores_of(truth, torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0]]))
    assert scores.mcc == pytest.approx(2 / 3)


@pytest.mark.parametrize(("d", "n", "floor"), [(64, 512, 0.372), (256, 2048, 0.213)])
def test_random_directions_score_the_known_floor(d, n, floor):
    cosine = cosines(unit_rows(n, d), unit_rows(n, d, seed=1))
    assert float(cosine.amax(dim=1).mean()) == pytest.approx(floor, abs=0.006)


def test_firing_scores_by_hand():
    features = torch.tensor([[1, 0], [1, 0], [1, 1], [0, 0]], dtype=torch.bool)
    latents = torch.tensor([[0, 1], [0, 1], [0, 0], [1, 1]], dtype=torch.bool)
    # Feature 0 with latent 1: both in 2 rows, precision 2/3, recall 2/3. Feature 1 with latent 0:
    # never together.
    counts = FiringCounts(Pairs(torch.tensor([0, 1]), torch.tensor([1, 0])))
    for row in range(4):
        counts.update(latents[row : row + 1], features[row : row + 1])
    scores = counts.compute()
    assert scores.f1 == pytest.approx((2 / 3 + 0) / 2)
    assert scores.precision == scores.recall == pytest.approx((2 / 3 + 0) / 2)


def test_pairs_that_never_fire_count_0():
    counts = FiringCounts(Pairs(torch.tensor([0]), torch.tensor([0])))
    counts.update(torch.zeros(5, 1, dtype=torch.bool), torch.zeros(5, 1, dtype=torch.bool))
    assert counts.compute().f1 == 0


def test_nearest_pairs_every_latent():
    cosine = torch.tensor([[0.1, -0.9, 0.5], [0.2, 0.3, 0.4]])
    assert nearest(cosine).features.tolist() == [1, 0, 0]
    assert nearest(cosine).latents.tolist() == [0, 1, 2]
