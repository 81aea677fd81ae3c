import math

import pytest

from sae.evaluate.report import ParetoPoint, at_equal_l0, pareto


def points(*pairs, seed=0):
    return [ParetoPoint(l0=float(l0), value=value, seed=seed) for l0, value in pairs]


def test_near_l0_is_taken_as_it_is_and_far_l0_is_read_between_neighbours():
    sweep = points((16, 0.4), (64, 0.2))
    assert at_equal_l0(sweep, 60.0) == [0.2]
    assert at_equal_l0(sweep, 32.0) == pytest.approx([0.3])  # half way in log L0
    assert at_equal_l0(sweep, 100.0) == []
    assert at_equal_l0(sweep, 8.0) == []


def test_every_seed_gives_one_figure():
    both = points((16, 0.4), (64, 0.2)) + points((31, 0.33), seed=1) + points((500, 0.1), seed=2)
    assert at_equal_l0(both, 32.0) == pytest.approx([0.3, 0.33])


def test_the_front_holds_what_nothing_beats():
    result = pareto(points((8, 0.5), (32, 0.2), (16, 0.6), (64, 0.2), (4, math.nan)),
                   smaller_is_better=True)  # fmt: skip
    assert [(p.l0, p.value) for p in result] == [(8, 0.5), (32, 0.2)]
    result = pareto(points((8, 0.5), (32, 0.2), (16, 0.6)), smaller_is_better=False)
    assert [(p.l0, p.value) for p in result] == [(8, 0.5), (16, 0.6)]


def test_a_target_of_nothing_is_refused():
    with pytest.raises(ValueError, match="target must be above 0, got 0"):
        at_equal_l0(points((8, 0.5)), 0.0)
