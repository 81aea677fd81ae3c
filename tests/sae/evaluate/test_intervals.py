import math

import pytest
import torch

from sae.statistics import Resamples, interval


def test_the_first_value_is_the_figure_itself():
    resamples = Resamples(3, 101, seed=0)
    means = resamples.mean(torch.tensor([1.0, 2, 6]).double(), torch.tensor([1.0, 1, 2]).double())
    assert means[0] == pytest.approx(9 / 4)
    assert len(means) == 102
    assert means[1:].min() >= 1
    assert means[1:].max() <= 3


def test_the_interval_has_the_width_of_the_standard_error():
    values = torch.randn(211, generator=torch.Generator().manual_seed(2)).double()
    result = interval(Resamples(211, 5003, seed=1).mean(values, torch.ones(211).double()))
    error = float(values.std()) / math.sqrt(211)
    assert result.value == pytest.approx(float(values.mean()))
    assert result.high - result.low == pytest.approx(2 * 1.96 * error, rel=0.06)


def test_contexts_that_agree_leave_no_doubt():
    result = interval(
        Resamples(7, 53, seed=0).mean(torch.full((7,), 4.0).double(), torch.ones(7).double())
    )
    assert (result.value, result.low, result.high) == (4, 4, 4)


def test_the_same_seed_gives_the_same_resamples():
    sums, n = torch.arange(5).double(), torch.ones(5).double()
    first, again, other = (Resamples(5, 31, seed).mean(sums, n) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_undefined_resamples_are_left_out():
    result = interval(torch.tensor([1.0, math.nan, 2.0, 2.0]).double())
    assert (result.value, result.low, result.high) == (1, 2, 2)
    assert math.isnan(interval(torch.tensor([math.nan, math.nan]).double()).low)
