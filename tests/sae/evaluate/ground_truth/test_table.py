import math
from dataclasses import replace

import pytest

from sae.evaluate.ground_truth.run import GroundTruthReport, interval, table_rows, table_text
from sae.evaluate.ground_truth.scores import DirectionScores, FiringScores


@pytest.fixture
def report():
    return GroundTruthReport(
        seed=0, n_rows=7, n_features=5, d_sae=3, f1_nearest=0.25, fvu=0.125, shrinkage=0.9, l0=2.0,
        l0_true=3.0, dead=0.0,
        directions=DirectionScores(mcc=0.5, mmcs=0.75, recovered=0.2, uniqueness=1.0),
        firing=FiringScores(f1=0.4, precision=0.3, recall=0.6),
        chance_directions=DirectionScores(mcc=0.1, mmcs=0.2, recovered=0.0, uniqueness=0.3),
        chance_firing=FiringScores(f1=0.05, precision=0.05, recall=0.05),
    )  # fmt: skip


def test_the_interval_is_students():
    # R: t.test(c(1, 2, 4))$conf.int is -1.460813 .. 6.127480
    mean, half = interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert mean - half == pytest.approx(-1.4612, abs=1e-3)
    assert mean + half == pytest.approx(6.1279, abs=1e-3)
    assert interval([2.0] * 30) == (2.0, 0.0)
    assert math.isnan(interval([1.0])[1])


def test_each_dictionary_has_a_row_and_its_floor(report):
    lines = table_rows({"a": [report], "b": [report, replace(report, fvu=0.375)]})
    assert [line[0] for line in lines] == ["dictionary", "a", "a, chance", "b", "b, chance"]
    head, a, a_chance, b, _ = (dict(zip(lines[0], line, strict=True)) for line in lines)
    assert head["seeds"] == "seeds"
    assert (a["MCC"], a["F1"], a["FVU"], a["seeds"]) == ("0.500", "0.400", "0.125", "1")
    assert (a_chance["MCC"], a_chance["F1"], a_chance["FVU"]) == ("0.100", "0.050", "")
    # Mean of 0.125 and 0.375; half width 12.706 * 0.17678 / sqrt(2).
    assert b["FVU"] == "0.250 ±1.588"
    assert b["MCC"] == "0.500 ±0.000"


def test_the_text_is_in_columns():
    assert table_text([("a", "bb", "c"), ("ddd", "e", "")]) == "a    bb  c\nddd  e"
