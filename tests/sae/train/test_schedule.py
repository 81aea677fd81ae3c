import pytest

from sae.train.loss_config import Control
from sae.train.optim_config import (
    Adam,
    falling_k,
    falling_p,
    first_target,
    ramp,
    random_prefixes,
    target_now,
    warmup_decay,
)


def test_ramp_table():
    assert [ramp(i, 20, 0.2) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert ramp(0, 20, 0.0) == 1.0


def test_warmup_then_decay_table():
    got = [warmup_decay(i, 10, 0.2, 0.4) for i in range(10)]
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_a_cosine_falls_slowly_first_and_last():
    got = [warmup_decay(i, 10, 0.2, 0.4, "cosine") for i in range(10)]
    high, low = (1 + 0.5**0.5) / 2, (1 - 0.5**0.5) / 2
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, high, 0.5, low])


def test_the_shape_of_the_fall_reaches_the_optimiser(entry, step_of, planted):
    for shape, expected in (("linear", 0.75), ("cosine", (1 + 0.5**0.5) / 2)):
        adam = Adam(lr=1e-2, warmup=0.0, decay=0.4, decay_shape=shape)
        step = step_of(entry("topk", optimizer=adam), total=10)
        for x in planted(8):
            step(x)
        rates = [group["lr"] for group in step.optimizer.param_groups]
        assert rates == pytest.approx([1e-2 * expected])


def test_no_decay_stays_at_1():
    assert [warmup_decay(i, 5, 0.0, 0.0) for i in range(5)] == [1.0] * 5


def test_the_l0_aimed_at_falls_by_equal_factors_and_stays():
    aim = Control(target=4.0)
    found = [target_now(aim, 64.0, step, 20) for step in range(14)]
    assert found == pytest.approx([4.0 * 16 ** (1 - step / 14) for step in range(14)])
    assert target_now(aim, 64.0, 14, 20) == target_now(aim, 64.0, 19, 20) == 4


def test_it_starts_from_as_many_latents_as_dimensions():
    aim = Control(target=4.0)
    assert first_target(aim, 19, 1000) == 19
    assert first_target(aim, 19, 52) == 13  # a quarter of the latents
    assert first_target(aim, 3, 1000) == 4
    assert first_target(Control(target=4.0, first=7.0), 19, 1000) == 7


def test_k_falls_to_its_end_and_stays():
    found = [falling_k(step, 20, 11, 3, 0.4) for step in range(10)]
    assert found == [11, 10, 9, 8, 7, 6, 5, 4, 3, 3]
    assert falling_k(0, 20, 11, 3, 0.0) == 3


def test_p_stays_at_1_and_then_falls_in_equal_jumps():
    found = [falling_p(step, 10, 0.2, 4, 0.2) for step in range(10)]
    assert found == pytest.approx([1, 1, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2])
    assert falling_p(9, 10, 0.2, 4, 1.0) == 1.0


def test_prefixes_are_drawn_by_seed_and_step_and_favour_short_ones():
    drawn = [random_prefixes(step, 5, 9, 97, 0.5) for step in range(400)]
    assert drawn == [random_prefixes(step, 5, 9, 97, 0.5) for step in range(400)]
    assert drawn[0] != drawn[1]
    assert drawn[0] != random_prefixes(0, 6, 9, 97, 0.5)
    for ends in drawn:
        assert ends[-1] == 97
        assert list(ends) == sorted(set(ends))
        assert 1 <= ends[0] < ends[-1]
        assert len(ends) <= 10
    ones = sum(random_prefixes(step, 0, 1, 97, 0.5)[0] == 1 for step in range(4000)) / 4000
    expected = (1 - 2**-0.5) / (1 - 98**-0.5)
    assert abs(ones - expected) < 0.03
