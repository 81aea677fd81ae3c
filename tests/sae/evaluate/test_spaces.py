"""All pairs at once: the figures of the single measures, nulls that hold, intervals that cover."""

import math
from dataclasses import astuple

import pytest
import torch
from scipy.stats import spearmanr

from activations_cache.checks import silent
from sae.evaluate import similarity
from sae.evaluate import spaces as module
from sae.evaluate.alignment import left_directions, product_nulls
from sae.evaluate.spaces import (
    CHANCE_PERMUTATIONS,
    COSTLY,
    COSTLY_PERMUTATIONS,
    MEASURES,
    Draws,
    _prepared,
    check_measure,
    compare,
)

SINGLE = {
    "cka": similarity.cka,
    "cknna": similarity.cknna,
    "rsa": similarity.rsa,
    "distance correlation": similarity.distance_correlation,
    "svcca": similarity.svcca,
    "pwcca": similarity.pwcca,
    "procrustes": lambda x, y: 1 - similarity.procrustes_distance(x, y) / 2,
}


BOUNDED = ("svcca", "procrustes")
"""No permutation reaches what its bound says that it cannot."""


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
        n = CHANCE_PERMUTATIONS if measure in BOUNDED and (a, b) == (0, 1) else len(null)
        assert figure.chance == pytest.approx(sum(null[:n]) / n, abs=1e-5)
        n_reached = sum(value >= figure.value - 1e-9 for value in null)
        assert figure.p == pytest.approx((1 + n_reached) / 20)


@pytest.mark.parametrize("measure", BOUNDED)
def test_where_the_bound_takes_too_much_memory_19_permutations_are_computed(
    spaces, measure, monkeypatch
):
    needed = 3 * 4 * 3 * 67**2
    for room, n in ((needed, 99), (needed - 1, 19)):
        monkeypatch.setattr(module, "BOUND_BYTES", room)
        [figure] = compare(spaces, [(0, 1)], measure, draws(67, 99))[0].values()
        assert figure.n_permutations == n


@pytest.mark.parametrize("measure", BOUNDED)
def test_no_permutation_exceeds_its_bound_and_one_of_rank_1_reaches_it(draw, measure):
    scales = torch.logspace(0, -3, 23, dtype=torch.float64)
    rows = [draw(67, 5), draw(67, 23, 1) * scales, draw(67, 1, 2), draw(67, 3, 3) + 7]
    orders = draws(67).orders
    prepared = _prepared([x.double() for x in rows], measure, torch.ones(67) > 0, 10)
    limits = prepared.limits(orders, lambda *_: None)
    loose = []
    for n, order in enumerate(orders):
        for a, x in enumerate(rows):
            for b, y in enumerate(rows):
                value = SINGLE[measure](x, y[order])
                assert value <= limits[n, a, b]
                loose.append(float(limits[n, a, b]) / value)
                if a == b == 2:
                    assert limits[n, a, b] == pytest.approx(value, rel=3e-4)
    assert sum(loose) / len(loose) < 1.5


@pytest.mark.parametrize("measure", MEASURES)
def test_a_relation_is_told_from_chance_and_stands_in_its_interval(spaces, measure):
    results, _ = compare(spaces, [(0, 1), (0, 2)], measure, draws(67, 99))
    near, far = results[0, 1], results[0, 2]
    few = COSTLY_PERMUTATIONS if measure in COSTLY else 99
    assert near.n_permutations == (99 if measure in BOUNDED else few)
    assert far.n_permutations == few
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


def ladder(draw, n_layers=5):
    """Each layer is the one before it and something new."""
    rows = [draw(89, 7)]
    for i in range(1, n_layers):
        rows.append(0.8 * rows[-1] + 0.6 * draw(89, 7, seed=i))
    return {f"l.{i}": x for i, x in enumerate(rows)}


def checked(spaces, measure, places, n_permutations=99):
    drawn, n = draws(89, n_permutations), len(spaces)
    pairs = [(a, b) for a in range(n) for b in range(n) if a != b]
    values = torch.full((n, n), math.nan, dtype=torch.float64).fill_diagonal_(1)
    for (a, b), figure in compare(spaces, pairs, measure, draws(89, 1, 1))[0].items():
        values[a, b] = figure.value
    return values, check_measure(spaces, values, places, measure, drawn)


def test_what_a_set_shares_with_a_part_of_it_is_closed_form(draw):
    """Procrustes: the root of the share of variance that is left; the limit is the nearest set."""
    x = draw(89, 8) * torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])
    spaces = {"x": x, "y": x + 2 * draw(89, 8, 1)}
    values, result = checked(spaces, "procrustes", [(0, 0), (0, 1)])
    removable, without_first = [], []
    for rows in spaces.values():
        share = torch.linalg.svdvals(rows - rows.mean(0)).square()
        share = share / share.sum()
        without_first.append((1 - share[0]).sqrt())
        left = [6, 4, 2, 1, 1, 1]  # of 8 components, without a quarter, a half, ...
        stays = [float(share[:n].sum().sqrt()) >= float(values[0, 1]) for n in left]
        removable.append((0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)[[*stays, False].index(False)])
    assert result.without_first == pytest.approx(float(sum(without_first)) / 2, abs=1e-6)
    assert result.removable == pytest.approx(sum(removable) / 2)
    assert 0 < result.removable < 0.9
    assert math.isnan(result.order)
    assert math.isnan(result.same_layer)


@pytest.mark.parametrize("measure", ["cka", "procrustes", "stitching", "svcca", "relative"])
def test_layers_that_move_on_are_told_by_their_distance(draw, measure):
    spaces = ladder(draw)
    values, result = checked(spaces, measure, [(0, i) for i in range(5)])
    both = ((values + values.T) / 2)[tuple(torch.triu_indices(5, 5, 1))]
    near = [-abs(a - b) for a in range(5) for b in range(a + 1, 5)]
    assert result.order == pytest.approx(spearmanr(both, near).statistic, abs=1e-9)
    assert result.order > 0.8
    assert result.p <= 0.05
    unordered = [(0, i) for i in (2, 0, 4, 1, 3)]
    assert checked(spaces, measure, unordered)[1].p > 0.05


def test_layers_of_another_cache_are_found_at_their_depth(draw):
    one = ladder(draw, 3)
    other = {f"m.{i}": x + 0.3 * draw(89, 7, 50 + i) for i, x in enumerate(one.values())}
    places = [(cache, depth) for cache in (0, 1) for depth in range(3)]
    assert checked({**one, **other}, "cka", places)[1].same_layer == 1
    mixed = [*places[:3], (1, 1), (1, 2), (1, 0)]
    assert checked({**one, **other}, "cka", mixed)[1].same_layer == 0
    _, alone = checked(one, "svcca", places[:3])
    assert math.isnan(alone.same_layer)


def test_a_measure_that_the_rows_do_not_allow_has_no_check(draw):
    spaces = {"x": draw(89, 97), "y": draw(89, 97, 1), "z": draw(89, 97, 2)}
    _, result = checked(spaces, "pwcca", [(0, 0), (0, 1), (0, 2)])
    assert all(math.isnan(figure) for figure in result)


def test_a_measure_that_sees_spans_alone_misses_all_components_but_one(draw):
    """A set and its projections have canonical correlations of 1."""
    _, result = checked({"x": draw(89, 5), "y": draw(89, 5, 1)}, "pwcca", [(0, 0), (0, 1)])
    assert result.removable == 0.99
    assert result.without_first == pytest.approx(1)


@pytest.mark.parametrize("measure", ["svcca", "pwcca", "procrustes"])
def test_a_null_in_float32_is_that_of_float64(draw, measure):
    """Within 1e-5, also where one column dwarfs the others."""
    spaces = {"x": draw(307, 61), "y": draw(307, 61, 1) * torch.linspace(1, 300, 61)}
    drawn = draws(307, 5, 1)
    [figure] = compare(spaces, [(0, 1)], measure, drawn)[0].values()
    x, y = spaces.values()
    null = [SINGLE[measure](x, y[order]) for order in drawn.orders]
    assert figure.chance == pytest.approx(sum(null) / 5, abs=1e-5)


@pytest.mark.parametrize("measure", ["svcca", "pwcca", "procrustes", "matching"])
def test_a_value_that_every_permutation_has_is_not_told_from_chance(draw, measure):
    """One column of two values in turn: exchanged or not, its size and its span are the same."""
    x = torch.tensor([1.0, -1.0]).double().repeat(20)[:, None]
    spaces, drawn = {"x": x, "y": x}, draws(40, 19, 1)._replace(orders=turned(40, 19))
    [figure] = compare(spaces, [(0, 1)], measure, drawn)[0].values()
    assert figure.value == pytest.approx(1)
    assert figure.p == 1


def turned(n, n_orders):
    """Permutations that exchange rows of one value with each other."""
    return torch.stack([(torch.arange(n) + 2 * i) % n for i in range(n_orders)])


def test_distances_keep_their_digits_and_their_ties(draw):
    x = draw(31, 7).double() + 1e3
    x[5], x[6] = x[4], x[4] + 1e-6
    expected = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(similarity.dissimilarities(x), expected, rtol=1e-12, atol=0)
    of_axes = similarity.dissimilarities(0.1 + 0.7 * torch.eye(31).double())
    assert of_axes[~torch.eye(31, dtype=torch.bool)].unique().numel() == 1


def test_products_of_permuted_matrices_are_those_by_hand(draw):
    """Also where there are other sets on the left, and numbers on the diagonals."""
    left, right = (draw(n, 29, seed).reshape(n, 29, 1) for n, seed in ((3, 0), (2, 1)))
    left, right = ((x @ x.mT + x + x.mT).float() for x in (left, right))
    orders = torch.stack([torch.randperm(29) for _ in range(11)])
    result = product_nulls(left, right, orders, silent)
    for order, products in zip(orders, result, strict=True):
        by_hand = torch.einsum("lij,rij->lr", left, right[:, order][:, :, order])
        torch.testing.assert_close(products.float(), by_hand, rtol=1e-4, atol=1e-3)


def test_figures_are_the_same_with_one_and_two_threads(spaces):
    before, results = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            results.append([compare(spaces, [(0, 1), (0, 2)], m, draws(67)) for m in MEASURES])
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    for (one, _), (two, _) in zip(*results, strict=True):
        for pair, figure in one.items():
            assert astuple(figure) == pytest.approx(astuple(two[pair]), abs=1e-9)


def test_left_directions_of_many_and_of_few_are_those_of_float64(draw):
    for shape in ((5, 9), (90, 70), (70, 90)):
        matrix = (
            torch.linalg.qr(draw(200, shape[0]))[0].T @ torch.linalg.qr(draw(200, shape[1], 1))[0]
        )
        left, sizes = left_directions(matrix.float())
        u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
        assert left.shape == u.shape
        assert float(sizes.sum()) == pytest.approx(float(s.sum()), rel=1e-5)
        projected = (left.double().T @ matrix).norm(dim=1).sort(descending=True).values
        assert torch.allclose(projected, s, atol=1e-4)
