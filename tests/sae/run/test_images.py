"""A dictionary of images against its baseline: differences, their signs and the verdict."""

import math

import numpy as np
import pytest

from sae.run.images import frozen_of, rival_of, verdict
from sae.statistics import Interval


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.05, "wins"),
        (-0.05, -0.01, "loses"),
        (-0.01, 0.05, "does not win"),
        (0.0, 0.05, "does not win"),
        (-0.05, 0.0, "does not win"),
        (math.nan, math.nan, "cannot be judged"),
    ],
)
def test_a_verdict_is_by_more_than_the_interval(low, high, said):
    assert verdict(Interval((low + high) / 2, low, high)) == said


def labels(share: float | None, auc: float | None, strongest: float | None, noise: float = 0.0):
    made = np.random.default_rng(0).normal(size=31) * noise
    ends = (None, None) if share is None else (share - 0.02, share + 0.02)
    return {
        "beats_null": {"value": share, "low": ends[0], "high": ends[1]},
        "auc": {"mean": auc},
        "influence": made.tolist(),
        "strongest": {"mean": strongest},
        "strongest_resampled": made.tolist(),
    }


def test_differences_are_the_dictionarys_less_the_baselines():
    better, worse = labels(0.5, 0.7, 0.3), labels(0.25, 0.6, 0.1)
    result, turned = rival_of(better, worse), rival_of(worse, better)
    for one, other, value in zip(result, turned, (0.25, 0.1, 0.2), strict=True):
        assert one.value == pytest.approx(value)
        assert other.value == pytest.approx(-value)
        assert (verdict(one), verdict(other)) == ("wins", "loses")
    # Newcombe's: independent intervals of .02 each
    assert result.share.high - result.share.value == pytest.approx(0.02 * math.sqrt(2))


def test_noise_that_both_share_cancels():
    better, worse = labels(0.5, 0.7, 0.3, noise=9.0), labels(0.5, 0.6, 0.1, noise=9.0)
    assert verdict(rival_of(better, worse).auc) == "wins"
    assert verdict(rival_of(better, worse).strongest) == "wins"
    other = labels(0.5, 0.6, 0.1, noise=-9.0)
    assert verdict(rival_of(better, other).auc) == "does not win"
    assert verdict(rival_of(better, other).strongest) == "does not win"


def test_what_was_not_measured_is_not_judged():
    result = rival_of(labels(None, None, None), labels(0.5, 0.7, 0.3))
    assert [verdict(one) for one in result] == ["cannot be judged"] * 3


def test_the_baseline_is_the_one_of_the_same_name():
    assert frozen_of("l1", ["topk-frozen", "l1-frozen"]) == "l1-frozen"
    assert frozen_of("gated", ["topk-frozen", "l1-frozen"]) == "topk-frozen"
    assert frozen_of("gated", []) is None
