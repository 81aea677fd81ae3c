"""The plan keeps to its budget, and says what each run costs."""

import dataclasses

import pytest

from sae.evaluate.config import ScalingConfig, flops_per_row, plan

CONFIG = ScalingConfig(
    output="x", d_in=13, budget_flops=1e9, widths=(53, 101, 211), ks=(3, 7), passes=3, batch=17
)


def test_costs_of_a_row_are_those_of_its_products():
    assert flops_per_row(13, 53, 3, "sparse") == 2 * 13 * 53 + 8 * 3 * 13
    assert flops_per_row(13, 53, 3, "dense") == 10 * 13 * 53


def test_the_grid_is_whole_and_uses_the_budget():
    runs = plan(CONFIG)
    assert {(r.d_sae, r.k) for r in runs} == {(w, k) for w in CONFIG.widths for k in CONFIG.ks}
    rows = sorted({r.rows for r in runs})
    assert len(runs) == 18
    assert len(rows) == 3
    assert all(r.rows == r.steps * 17 for r in runs)
    assert rows[1] / rows[0] == pytest.approx(2, rel=0.02)
    assert [r.flops for r in runs] == sorted(r.flops for r in runs)
    assert all(r.flops == r.rows * flops_per_row(13, r.d_sae, r.k, "sparse") for r in runs)
    assert 0.98e9 < sum(r.flops for r in runs) <= 1e9


def test_there_are_no_more_rows_than_there_are():
    assert max(r.rows for r in plan(dataclasses.replace(CONFIG, max_rows=1700))) == 1700


def test_a_budget_of_less_than_a_step_is_refused_with_the_rows_it_takes():
    with pytest.raises(ValueError, match=r"at least 68 rows.*raise budget_flops"):
        plan(dataclasses.replace(CONFIG, budget_flops=1e4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (53,)}, "widths must be at least 2"),
        ({"widths": (53, 41)}, "widths must rise"),
        ({"ks": (3, 59)}, "ks must be at most the smallest of widths, 53, got 59"),
        ({"spacing": 1.0}, "spacing must be above 1"),
        ({"passes": 1}, "passes must be at least 2"),
        ({"budget_flops": 0.0}, "budget_flops must be a positive number"),
        ({"output": ""}, "output must name a directory"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
