import math

import numpy as np
import pytest
from scipy import stats

from sae.statistics import compare, compare_all


def test_the_detectable_difference_has_its_closed_form():
    result = compare("a", [0.1, 0.2, 0.3], "b", [0.5, 0.6, 0.7])
    assert result.noise == pytest.approx(0.1)
    t = stats.t.ppf(0.975, 4) + stats.t.ppf(0.8, 4)
    assert result.detectable == pytest.approx(t * 0.1 * math.sqrt(2 / 3))
    assert result.difference == pytest.approx(-0.4)
    assert result.verdict == "a < b"
    assert compare("b", [0.5, 0.6, 0.7], "a", [0.1, 0.2, 0.3]).verdict == "b > a"


def test_below_it_is_a_tie_and_without_seeds_it_is_unknown():
    assert compare("a", [0.1, 0.2, 0.3], "b", [0.2, 0.3, 0.4]).verdict == "tie"
    assert compare("a", [0.1], "b", [0.9]).verdict == "unknown"
    assert compare("a", [0.1, 0.1], "b", [0.1, 0.1]).verdict == "tie"
    assert compare("a", [0.1, math.nan], "b", [0.1, 0.1]).verdict == "unknown"


def test_groups_of_one_recipe_are_rarely_told_apart():
    generator = np.random.default_rng(0)
    verdicts = [
        compare("a", list(generator.normal(size=3)), "b", list(generator.normal(size=3))).verdict
        for _ in range(500)
    ]
    assert verdicts.count("tie") > 480


def test_a_difference_of_that_size_is_found_most_of_the_time():
    """With the noise known, a true difference of `detectable` passes the t-test 4 times in 5."""
    generator = np.random.default_rng(1)
    t = stats.t.ppf(0.975, 8) + stats.t.ppf(0.8, 8)
    shift = t * math.sqrt(2 / 5)
    results = [
        stats.ttest_ind(generator.normal(size=5), generator.normal(shift, size=5)).pvalue < 0.05
        for _ in range(500)
    ]
    assert np.mean(results) == pytest.approx(0.8, abs=0.07)


def test_all_pairs_come_once():
    result = compare_all({"a": [1.0], "b": [2.0], "c": [3.0]})
    assert [(c.a, c.b) for c in result] == [("a", "b"), ("a", "c"), ("b", "c")]
    with pytest.raises(ValueError, match="both groups must have a value, got 0 and 1"):
        compare("a", [], "b", [1.0])
