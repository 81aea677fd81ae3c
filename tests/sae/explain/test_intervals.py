"""Intervals against hand-worked figures and against scipy and scikit-learn."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from sae.statistics import Interval, auc, correlation, weighted_sum, wilson


@pytest.mark.parametrize(("right", "n"), [(0, 7), (3, 7), (7, 7), (50, 101)])
def test_wilson_is_scipys(right, n):
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    result = wilson(right, n)
    assert result == pytest.approx((right / n, expected.low, expected.high), abs=1e-6)


def test_no_trials_are_refused():
    with pytest.raises(ValueError, match="n must be positive, got 0"):
        wilson(0, 0)


def test_a_weighted_sum_adds_squares_of_halves():
    parts = [(0.5, Interval(0.6, 0.3, 0.7)), (0.5, Interval(0.4, 0.0, 0.7))]
    assert weighted_sum(parts) == pytest.approx((0.5, 0.5 - 0.25, 0.5 + np.hypot(0.05, 0.15)))
    assert weighted_sum([(1.0, Interval(0.4, 0.1, 0.9))]) == pytest.approx((0.4, 0.1, 0.9))


def test_auc_is_scikit_learns_and_its_interval_covers():
    made = np.random.default_rng(0)
    n_inside = 0
    for _ in range(200):
        positive, negative = made.normal(1.0, 1, 23), made.normal(0, 1, 31)
        result = auc(positive, negative)
        truth = [1] * 23 + [0] * 31
        assert result.value == pytest.approx(roc_auc_score(truth, np.r_[positive, negative]))
        n_inside += result.low <= stats.norm.cdf(1 / np.sqrt(2)) <= result.high
    assert 182 <= n_inside <= 199
    assert auc(np.ones(5), np.ones(7)).value == 0.5
    perfect = auc(np.ones(5), np.zeros(7))
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert 0.3 < perfect.low < 0.8
    with pytest.raises(ValueError, match="must both be there, got 0 and 7"):
        auc(np.ones(0), np.ones(7))


def test_correlation_is_over_all_tokens_together():
    real = [[0.0, 1.0, 0.0], [2.0, 0.0], [0.0, 0.0, 5.0, 1.0]]
    flat = np.concatenate([np.array(w) for w in real])
    guess = [[0.1, 3.0, 0.0], [2.0, 0.4], [0.0, 1.0, 4.0, 0.0]]
    flat_guess = np.concatenate([np.array(w) for w in guess])
    assert correlation(guess, real).value == pytest.approx(np.corrcoef(flat, flat_guess)[0, 1])
    by_ranks = correlation(guess, real, ranks=True).value
    assert by_ranks == pytest.approx(stats.spearmanr(flat, flat_guess).statistic)
    assert correlation(real, real).value == pytest.approx(1.0)
    affine = [[3 * value + 7 for value in window] for window in guess]
    assert correlation(affine, real) == pytest.approx(correlation(guess, real))


def test_a_constant_has_no_correlation():
    real = [[0.0, 1.0], [2.0, 0.0]]
    assert correlation([[0.3, 0.3], [0.3, 0.3]], real) is None
    assert correlation(real, [[0.1, 0.1], [0.1, 0.1]]) is None
    assert correlation([], []) is None


def test_shuffled_predictions_cover_zero():
    made = np.random.default_rng(1)
    inside = 0
    for trial in range(100):
        real, guess = made.exponential(size=(2, 29, 7)).tolist()
        result = correlation(guess, real, seed=trial)
        inside += result.low <= 0 <= result.high
    assert 88 <= inside <= 100
