import pytest

from sae.train.schedule import ramp, warmup_decay


def test_ramp_table():
    assert [ramp(i, 20, 0.2) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert ramp(0, 20, 0.0) == 1.0


def test_warmup_then_decay_table():
    got = [warmup_decay(i, 10, 0.2, 0.4) for i in range(10)]
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_no_decay_stays_at_1():
    assert [warmup_decay(i, 5, 0.0, 0.0) for i in range(5)] == [1.0] * 5
