"""All pairs at once: the figures of the single measures, nulls that hold, intervals that cover."""

import math

import pytest
import torch

from sae.evaluate import similarity
from sae.evaluate.spaces import COSTLY_PERMUTATIONS, MEASURES, Draws, compare

SINGLE = {
    "cka": similarity.cka,
    "cknna": similarity.cknna,
    "rsa": similarity.rsa,
    "distance correlation": similarity.distance_correlation,
    "svcca": similarity.svcca,
    "pwcca": similarity.pwcca,
    "procrustes": lambda x, y: 1 - similarity.procrustes_distance(x, y) / 2,
}


def draws(n, n_permutations=19, n_draws=50, examples=None):
    example = torch.arange(n) if examples is None else torch.arange(n) % examples
    return Draws.of(example, n_permutations, n_draws, 0)


@pytest.fixture
def spaces(draw):
    x = draw(67, 5)
    return {"x": x, "near": x[:, :3] + 0.5 * draw(67, 3, 1), "far": draw(67, 7, 2)}


@pytest.mark.parametrize("measure", SINGLE)
def test_each_is_the_single_measure_and_so_is_its_null(spaces, measure):
    rows, drawn = list(spaces.values()), draws(67)
    results, problems = compare(spaces, [(0, 1), (1, 2)], measure, drawn)
    assert problems == []
    for (a, b), figure in results.items():
        assert figure.value == pytest.approx(SINGLE[measure](rows[a], rows[b]), abs=1e-6)
        null = [SINGLE[measure](rows[a], rows[b][order]) for order in drawn.orders]
        assert figure.chance == pytest.approx(sum(null) / len(null), abs=1e-5)
        n_reached = sum(value >= figure.value - 1e-9 for value in null)
        assert figure.p == pytest.approx((1 + n_reached) / 20)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_relation_is_told_from_chance_and_stands_in_its_interval(spaces, measure):
    results, _ = compare(spaces, [(0, 1), (0, 2)], measure, draws(67, 99))
    near, far = results[0, 1], results[0, 2]
    assert near.n_permutations == (99 if measure in list(SINGLE)[:4] else COSTLY_PERMUTATIONS)
    assert near.p == pytest.approx(1 / (1 + near.n_permutations))
    assert far.p > 0.04
    assert far.high < near.low <= near.value <= near.high
    assert near.value > near.chance_high >= near.chance


@pytest.mark.parametrize("measure", MEASURES)
def test_the_interval_is_as_wide_as_the_figure_varies_over_samples(draw, measure):
    """First order: spread of the draws against that of 30 new samples of 101 rows."""
    mix = draw(4, 3, 9)

    def sample(seed):
        x = draw(101, 4, 2 * seed)
        return {"x": x, "y": x @ mix + draw(101, 3, 2 * seed + 1)}

    of_samples, widths = [], []
    for seed in range(30):
        [figure] = compare(sample(seed), [(0, 1)], measure, draws(101, 1, 60))[0].values()
        of_samples.append(figure.value)
        widths.append(figure.high - figure.low)
    spread = float(torch.tensor(of_samples).std())
    assert 0.6 < sum(widths) / 30 / (2 * 1.96 * spread) < 1.6


def test_rows_of_one_example_are_drawn_together(draw):
    """The same rows five times over: as many intervals as examples, not as rows."""
    x = draw(31, 3)
    spaces = {"x": x.repeat(5, 1), "y": (x + draw(31, 3, 1)).repeat(5, 1)}
    width = [
        figure.high - figure.low
        for examples in (31, None)
        for figure in compare(spaces, [(0, 1)], "procrustes", draws(155, 1, 200, examples))[
            0
        ].values()
    ]
    assert width[0] / width[1] == pytest.approx(math.sqrt(5), rel=0.3)


def test_pairs_that_rows_do_not_allow_are_left_out_with_the_reason(draw):
    spaces = {"narrow": draw(23, 3), "other": draw(23, 4, 1), "wide": draw(23, 29, 2)}
    results, problems = compare(spaces, [(0, 1), (0, 2)], "pwcca", draws(23))
    assert list(results) == [(0, 1)]
    [problem] = problems
    assert "more rows than directions of both sides (25)" in problem
    with pytest.raises(ValueError, match=r"neighbours must be in 1\.\.22 for 23 rows, got 23"):
        compare(spaces, [(0, 1)], "cknna", draws(23), k=23)
    with pytest.raises(ValueError, match="permutations must be at least 1, got 0"):
        draws(23, 0)


INDEPENDENT = {
    "rsa": 0.39637143488957843,  # scipy 1.17: spearmanr of two pdist
    "procrustes": 0.643220810521721,  # scipy 1.17: sqrt(1 - disparity) of spatial.procrustes
    "svcca": 0.6982257259326201,  # google/svcca, get_cca_similarity; all components are kept
    "pwcca": 0.7149251816819969,  # the paper's weights on google/svcca's directions
    "cka": 0.4614022421172044,  # the debiased feature-space form of Kornblith et al.'s notebook
}


@pytest.mark.parametrize("measure", INDEPENDENT)
def test_figures_equal_those_of_independent_implementations(measure):
    """On rows that need no generator, so that any program makes the same."""
    i = torch.arange(1, 41, dtype=torch.float64)[:, None]
    x = (0.37 * i * torch.arange(1, 6)).sin()
    y = (0.21 * i * torch.arange(2, 6)).cos() + x[:, :4]
    [figure] = compare({"x": x, "y": y}, [(0, 1)], measure, draws(40))[0].values()
    assert figure.value == pytest.approx(INDEPENDENT[measure], abs=1e-6)
