import math

import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score

from sae.evaluate.geometry import (
    encoded_concepts,
    inherent_interpretability,
    kurtosis,
    modality_gap,
    nearest_distances,
    outlier_dimensions,
    pruned,
    rankme,
    rarity,
    two_nn,
)


@pytest.mark.parametrize(("k", "published"), [(1, 1.000), (5, 5.001), (32, 32.002)])
def test_rankme_of_k_equal_singular_values_is_k(draw, k, published):
    left, right = torch.linalg.qr(draw(211, k)).Q, torch.linalg.qr(draw(64, k, seed=1)).Q
    assert rankme(left @ right.T) == pytest.approx(published, abs=2e-3)


def test_rankme_needs_a_row(draw):
    with pytest.raises(ValueError, match="must have a row other than 0, got 7 rows of 0"):
        rankme(torch.zeros(7, 3))


@pytest.mark.parametrize(("d", "published"), [(1, 1.0), (2, 2.01), (5, 4.83), (10, 8.76)])
def test_two_nn_of_a_uniform_cube(d, published):
    """Published to two digits from one draw each; the spread over draws is about 3 %."""
    generator = torch.Generator().manual_seed(d)
    cube = torch.rand(2003, d, generator=generator, dtype=torch.float64)
    result = two_nn(cube @ torch.eye(d, 17).double() + 30)
    assert result.dimension == pytest.approx(published, rel=0.09)
    assert result.n_rows == 2003


def test_distances_are_exact_where_products_lose_them():
    x = torch.tensor([[1e4], [1e4 + 1e-7], [1e4 + 3e-7]], dtype=torch.float64)
    assert nearest_distances(x)[0].tolist() == pytest.approx([1e-7, 3e-7], rel=1e-4)


@pytest.mark.parametrize("shape", ["one cloud", "far clusters", "many equal rows"])
def test_distances_equal_those_of_all_differences(draw, shape):
    """Candidates come from products: clusters far apart are where products lose the near rows."""
    x = {
        "one cloud": draw(211, 13),
        "far clusters": (1e8 * draw(7, 5)).repeat_interleave(31, 0) + 1e-3 * draw(217, 5, seed=1),
        "many equal rows": draw(211, 3).round(),
    }[shape].double()
    x = x - x.mean(0)
    distance = (x[:, None] - x).square().sum(2).sqrt().fill_diagonal_(math.inf)
    expected = distance.topk(2, dim=1, largest=False).values
    assert torch.allclose(nearest_distances(x), expected, rtol=1e-12, atol=0)


def test_duplicates_are_left_out_and_counted(draw):
    x = draw(101, 3)
    result = two_nn(torch.cat([x, x[:7]]))
    assert (result.n_rows, result.n_duplicates) == (94, 14)
    with pytest.raises(ValueError, match="at least 10 rows that differ, got 0"):
        two_nn(torch.ones(23, 3))
    with pytest.raises(ValueError, match="discard must be at least 0 and below 1, got 1"):
        two_nn(x, discard=1.0)


def test_kurtosis_of_known_distributions(draw):
    n = 40009
    x = draw(n, 3)
    x[:, 1] = torch.arange(n) % 2  # two values: 1
    x[:, 2] = 4.0
    result = kurtosis(x)
    assert result[0] == pytest.approx(3, abs=4 * math.sqrt(24 / n))
    assert result[1] == pytest.approx(1, abs=1e-4)
    assert math.isnan(result[2])


def test_a_planted_outlier_is_found_and_a_rotation_removes_it(draw, rotation):
    x = draw(503, 97)
    x[:, 41] *= 40
    x[:, 7] *= 9
    result = outlier_dimensions(x)
    assert result.dimensions.tolist() == [41, 7]
    assert result.ratio[0] == pytest.approx(40, rel=0.15)
    turned = x @ rotation(97)
    assert float(kurtosis(turned).mean()) < 3.5
    assert outlier_dimensions(turned).dimensions.tolist() == []
    with pytest.raises(ValueError, match=r"ratio must be above 1, got 1\.0"):
        outlier_dimensions(x, ratio=1.0)


def test_the_modality_gap_is_the_planted_offset(draw):
    offset = torch.zeros(11).double()
    offset[3] = 0.7
    x = draw(20011, 11)
    assert modality_gap(x, x + offset, unit=False) == pytest.approx(0.7)
    assert modality_gap(x, draw(20011, 11, seed=1)) < 0.02
    assert modality_gap(x * 5, x) == pytest.approx(0)
    with pytest.raises(ValueError, match=r"rows of one width, got \(20011, 11\) and \(3, 5\)"):
        modality_gap(x, draw(3, 5))


def test_the_planted_rare_feature_comes_first(draw):
    generator = torch.Generator().manual_seed(3)
    reference = draw(1009, 13).clamp_min(0)
    sample = reference[:5].clone()
    sample[2, 7] = 30.0
    result = rarity(reference, sample, generator)
    assert result.explanation(2, 3)[0] == 7
    assert int(result.score.argmax()) == 2


def test_tail_probabilities_of_ordinary_samples_are_uniform(draw):
    """Zeros of sparse features included."""
    reference, samples = draw(499, 5).clamp_min(0), draw(1009, 5, seed=1).clamp_min(0)
    result = rarity(reference, samples, torch.Generator().manual_seed(4))
    assert min(stats.kstest(column.numpy(), "uniform").pvalue for column in result.p.T) > 0.01
    assert float(result.score.mean()) == pytest.approx(1, abs=0.06)


def test_weights_decide_which_features_count(draw):
    reference, sample = draw(101, 3), torch.tensor([[50.0, 0.0, 0.0]]).double()
    generator = torch.Generator().manual_seed(5)
    only_first = torch.tensor([1.0, 0.0, 0.0])
    assert rarity(reference, sample, generator, only_first).score[0] > math.log(102)
    with pytest.raises(ValueError, match="weights must be at least 0 and not all 0, got sum 0"):
        rarity(reference, sample, generator, torch.zeros(3))
    with pytest.raises(ValueError, match=r"as wide as the samples, got \(101, 3\) and \(2, 5\)"):
        rarity(reference, draw(2, 5), generator)


def test_a_constant_ratio_gives_ratio_times_range():
    assert inherent_interpretability([0.1, 0.2, 0.7], [0.4] * 3, 0.8) == pytest.approx(0.3)
    assert inherent_interpretability([0.0, 1.0], [1.0, 0.0], 1.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1], [0.4], 1.0), "at least two points each, got 1 and 1"),
        (([0.1, 0.1], [0.4, 0.4], 1.0), r"must ascend, got \[0\.1, 0\.1\]"),
        (([0.1, 0.2], [0.4, 0.4], 0.0), "reference must be above 0, got 0"),
    ],
)
def test_points_without_an_integral_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        inherent_interpretability(*arguments)


def planted(draw, rotation):
    """Two concepts along a direction each, a third that no direction has; rotated."""
    has = torch.stack([draw(401, 1, seed)[:, 0] > 0.7 for seed in (1, 2, 3)], 1)
    x = 0.3 * draw(401, 11)
    x[:, 0] += 9 * has[:, 0]
    x[:, 1] -= 5 * has[:, 1]
    return x @ rotation, has


def test_planted_concepts_are_counted_whatever_the_basis(draw):
    rotation = torch.linalg.qr(draw(11, 11, 5)).Q
    result, as_made = (
        encoded_concepts(*planted(draw, r)) for r in (rotation, torch.eye(11, dtype=rotation.dtype))
    )
    assert (result.unique(), result.per_direction()) == (2, 1.0)
    assert torch.allclose(result.precision, as_made.precision, atol=1e-3)
    assert result.precision[0, 0] > 0.99
    assert result.precision[1, 1] > 0.99
    assert result.precision[:, 2].max() < 0.6
    x, has = planted(draw, rotation)
    _, _, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    along = (x - x.mean(0)) @ v.T
    for direction, concept in ((0, 0), (1, 2), (7, 1)):
        signs = (along[:, direction], -along[:, direction])
        by_sklearn = max(average_precision_score(has[:, concept], side) for side in signs)
        assert float(result.precision[direction, concept]) == pytest.approx(by_sklearn, abs=1e-4)


def test_concepts_that_no_row_has_are_no_concepts(draw):
    result = encoded_concepts(draw(31, 5), torch.zeros(31, 2, dtype=torch.bool))
    assert result.unique() == 0
    assert math.isnan(result.per_direction())
    with pytest.raises(ValueError, match="has must have a row for each of the 31 rows, got 7"):
        encoded_concepts(draw(31, 5), torch.zeros(7, 2, dtype=torch.bool))


def test_an_answer_in_the_largest_direction_needs_no_other(draw):
    x, has = planted(draw, torch.linalg.qr(draw(11, 11, 5)).Q)
    labels = has[:, 0].long()
    result = pruned(x[:300], labels[:300], x[300:], labels[300:], [0.0, 0.9])
    assert result[0.0] == (1.0, 1.0)
    chance = max(float(labels[300:].double().mean()), 1 - float(labels[300:].double().mean()))
    assert result[0.9].smallest == 1.0
    assert result[0.9].largest == pytest.approx(chance, abs=0.05)
    with pytest.raises(ValueError, match="labels must be of two classes, got 1"):
        pruned(x, torch.zeros(401).long(), x, labels)
    with pytest.raises(ValueError, match=r"shares must be in 0\.\.1, got 1\.5"):
        pruned(x, labels, x, labels, [1.5])
