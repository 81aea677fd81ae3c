"""Counts, information and chance are what their definitions say."""

import itertools
import math
import time

import numpy as np
import pytest

from sae.explain import statistics as module
from sae.explain.statistics import (
    mutual_information,
    normalised_pmi,
    p_values,
    permuted_rows,
    rule_information,
    top_words,
)


def _entropy_of(counts: list[int]) -> float:
    total = sum(counts)
    return -sum(c / total * math.log(c / total) for c in counts if c)


def _by_definition(joint: int, fired: int, present: int, n: int) -> float:
    """H(c) + H(w) - H(c, w), with the sign of the association."""
    table = [joint, fired - joint, present - joint, n - fired - present + joint]
    nats = (
        _entropy_of([fired, n - fired]) + _entropy_of([present, n - present]) - _entropy_of(table)
    )
    return nats if joint * n >= fired * present else -nats


def test_mutual_information_equals_its_definition():
    n = 11
    tables = [
        (joint, fired, present)
        for fired, present in itertools.product(range(n + 1), repeat=2)
        for joint in range(max(0, fired + present - n), min(fired, present) + 1)
    ]
    joint, fired, present = (np.array(column) for column in zip(*tables, strict=True))
    result = mutual_information(joint, fired, present, n)
    expected = [_by_definition(*table, n) for table in tables]
    np.testing.assert_allclose(result, expected, atol=1e-12)


def test_information_of_a_copy_is_its_entropy_and_of_an_opposite_is_negative():
    same, opposite = mutual_information(
        np.array([30, 0]), np.array([30, 30]), np.array([30, 70]), 100
    )
    assert same == pytest.approx(_entropy_of([30, 70]))
    assert opposite == pytest.approx(-same)


def test_normalised_pmi_runs_from_never_to_always():
    joint, fired, present = (
        np.array([0, 25, 10, 5]),
        np.array([10, 50, 10, 10]),
        np.array([10, 50, 10, 20]),
    )
    never, independent, always, some = normalised_pmi(joint, fired, present, 100)
    assert (never, always) == (-1.0, pytest.approx(1.0))
    assert independent == pytest.approx(0.0)
    assert some == pytest.approx(math.log(0.05 / (0.1 * 0.2)) / -math.log(0.05))


def test_rule_information_equals_the_entropy_of_the_joint_table():
    joint, present, fired, n = [5, 2, 0], [6, 9, 0], 11, 53
    cells = [5, 2, 4, 1, 7, 53 - 15 - 4]  # firing by word and other, silent by word and other
    expected = _entropy_of([fired, n - fired]) + _entropy_of([6, 9, 38]) - _entropy_of(cells)
    result = rule_information(np.array([joint]), np.array([present]), np.array([fired]), n)
    assert result[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("cells", [1, 50, 1 << 18])
def test_top_words_equal_brute_force(cells: int, codes_of, monkeypatch):
    monkeypatch.setattr(module, "_CELLS", cells)
    made = np.random.default_rng(0)
    n, d_sae, n_words = 997, 13, 29
    values = made.integers(-1, n_words, n).astype(np.int32)
    values[made.random(n) < 0.4] = 3
    values[[5, 500]] = n_words  # too rare to count
    fires = made.random((n, d_sae)) < 0.05
    fires[:, 7] = values == 11
    fires[:, 8] = False
    result = top_words(codes_of(fires), values, 5, 3)
    for latent in range(d_sae):
        expected = []
        for word in range(n_words):
            has, fired = values == word, fires[:, latent]
            joint = int((has & fired).sum())
            nats = _by_definition(joint, int(fired.sum()), int(has.sum()), n)
            if nats > 0 and joint >= 2:
                expected.append((-nats, word, joint, int(has.sum())))
        expected = sorted((round(nats, 12), *rest) for nats, *rest in expected)[:5]
        listed = result.value[latent] >= 0
        assert result.value[latent][listed].tolist() == [word for _, word, _, _ in expected]
        assert result.joint[latent][listed].tolist() == [joint for *_, joint, _ in expected]
        assert result.present[latent][listed].tolist() == [count for *_, count in expected]
        np.testing.assert_allclose(
            result.information[latent][listed], [-nats for nats, *_ in expected], atol=1e-11
        )
        assert not result.joint[latent][~listed].any()
    assert result.value[7, 0] == 11
    assert (result.value[8] == -1).all()


def test_equal_words_come_in_the_order_of_their_index(codes_of):
    values = np.repeat(np.array([4, 2, 9, -1], np.int32), 10)
    fires = np.zeros((40, 2), bool)
    fires[:30, 0] = True
    result = top_words(codes_of(fires), values, 3, 1)
    assert result.value[0].tolist() == [2, 4, 9]


def test_no_value_at_all_gives_no_word(codes_of):
    result = top_words(codes_of(np.ones((7, 2), bool)), np.full(7, -1, np.int32), 3, 1)
    assert (result.value == -1).all()


def test_permuted_rows_keep_examples_whole_and_in_cyclic_order():
    lengths = [5, 1, 7, 3, 11]
    example = np.repeat(np.arange(5, dtype=np.int32) * 2, lengths)
    start = dict(zip(range(0, 10, 2), np.cumsum(lengths) - lengths, strict=True))
    seen_orders, seen_turns = set(), set()
    for seed in range(20):
        order = permuted_rows(example, np.random.default_rng(seed))
        assert sorted(order.tolist()) == list(range(27))
        moved = example[order]
        runs = [list(run) for _, run in itertools.groupby(range(27), key=lambda i: moved[i])]
        assert len(runs) == 5
        for run in runs:
            inside = order[run] - start[moved[run[0]]]
            assert ((np.diff(inside) % len(run)) == (1 % len(run))).all()
        seen_orders.add(tuple(moved[run[0]] for run in runs))
        seen_turns.add(order[runs[0][0]] - start[moved[runs[0][0]]])
    assert len(seen_orders) > 10
    assert len(seen_turns) > 3


def test_p_is_uniform_where_observed_and_permuted_are_alike(codes_of):
    made = np.random.default_rng(0)
    n_latents, n_permutations = 1009, 5
    scale = np.exp(made.normal(size=(n_latents, 1)))  # each latent has its own chance
    draws = made.gamma(3.0, size=(n_latents, n_permutations + 1)) * scale
    codes = codes_of(np.ones((100_003, 1), bool))
    codes = type(codes)(made.integers(20, 999, n_latents), codes.row, codes.value, codes.n_rows)
    eligible = np.ones(n_latents, bool)
    eligible[::7] = False
    p = p_values(draws[:, 0], draws[:, 1:], codes, eligible)
    for level in (0.02, 0.05, 0.2, 0.5):
        share = (p[eligible] <= level).mean()
        assert share == pytest.approx(level, abs=0.02 + 3 * math.sqrt(level / n_latents))
        assert share <= level + 2 * math.sqrt(level / n_latents)
    assert (p[~eligible] == 1).all()
    strong = p_values(draws[:, 0] * 100, draws[:, 1:], codes, eligible)
    assert (strong[eligible] < 0.01).all()


def test_half_a_thousand_latents_on_a_hundred_thousand_rows_take_seconds(codes_of):
    made = np.random.default_rng(0)
    n, d_sae, per_row = 100_003, 499, 19
    latent = np.sort(made.integers(0, d_sae, n * per_row))
    n_fired = np.bincount(latent, minlength=d_sae)
    row = np.concatenate([np.sort(made.integers(0, n, count)) for count in n_fired])
    codes = codes_of(np.zeros((1, 1)))
    codes = type(codes)(n_fired, row.astype(np.int32), np.ones(len(row), np.float32), n)
    values = (made.zipf(1.3, n) % 30_011).astype(np.int32)
    began = time.process_time()
    top_words(codes, values, 50, 5)
    assert time.process_time() - began < 3.0


def test_word_met_once_with_the_latent_is_not_listed(codes_of):
    values = np.zeros(101, np.int32)
    values[:10] = 1
    fires = np.zeros((101, 2), bool)
    fires[9:12, 0] = True  # once on the word
    fires[8:12, 1] = True  # twice
    result = top_words(codes_of(fires), values, 3, 5)
    assert result.value[:, 0].tolist() == [-1, 1]
