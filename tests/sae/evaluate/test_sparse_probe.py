import itertools

import numpy as np
import pytest
import torch

from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.probe_tasks import Task, codes_of, columns, default_arms, mean_difference, raw
from sae.evaluate.sparse_probe import auc, auc_interval, probe

N_TRAIN, N_TEST, D = 503, 307, 11


@pytest.fixture(scope="module")
def planted():
    """Features 0 and 1 of a dictionary; the label is feature 0, which two dimensions share."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    features = torch.rand(N_TRAIN + N_TEST, D, generator=generator)
    features = features * (torch.rand(features.shape, generator=generator) < 0.3)
    y = (features[:, 0] > 0).numpy()
    x = features @ directions
    task = Task(x[:N_TRAIN], y[:N_TRAIN], x[N_TRAIN:], y[N_TRAIN:], np.arange(N_TEST) // 3)
    dictionary = SparseAutoencoder(SAEConfig(d_in=D, d_sae=D, activation=ReLU(), b_in="none"))
    dictionary.enc_rows.data.copy_(directions)
    dictionary.dec_rows.data.copy_(directions)
    dictionary.b_enc.data.fill_(-1e-3)
    return task, dictionary.requires_grad_(False)


@pytest.fixture(scope="module")
def report(planted):
    task, dictionary = planted
    arms = default_arms({"true": dictionary}, {"true": 3.3}, torch.Generator().manual_seed(1))
    return probe(task, arms)


def test_the_planted_latent_is_found_by_one_unit(report):
    result = report.arms["true"][1]
    assert result.units == (0,)
    assert result.auc.value > 0.99
    assert result.accuracy > 0.95
    assert result.f1 > 0.9
    assert result.auc.low <= result.auc.value <= result.auc.high


def test_every_arm_stands_beside_the_dictionary(report):
    assert list(report.arms) == ["true", "true, random", "raw neurons"]
    assert all(list(of_one) == [1, 2, 5] for of_one in report.arms.values())
    assert report.arms["raw neurons"][1].auc.value < 0.9
    assert report.arms["true, random"][1].auc.value < 0.9
    assert report.dense.auc.value > 0.9
    assert (report.n_train, report.n_test) == (N_TRAIN, N_TEST)
    assert report.base_rate == pytest.approx(0.3, abs=0.06)


def test_more_units_tell_more_of_what_is_spread(report):
    results = [report.arms["raw neurons"][k].auc.value for k in (1, 5)]
    assert results[1] > results[0]


def test_a_label_of_one_latent_stays_interpretable_at_any_sparsity(planted, report):
    """IIS: one true latent is as good as all dimensions, and one raw neuron is not."""
    task, _ = planted
    accuracy = {arm: [s.accuracy for s in by_k.values()] for arm, by_k in report.arms.items()}
    dense = report.dense.accuracy
    by_hand = (1.5 * accuracy["true"][2] + 2 * accuracy["true"][1] + 0.5 * accuracy["true"][0]) / 4
    assert report.interpretability("true", D) == pytest.approx(by_hand / dense)
    assert report.interpretability("true", D) > 0.99
    assert report.interpretability("raw neurons", D) < report.interpretability("true", D) - 0.05
    with pytest.raises(ValueError, match="at least two points"):
        probe(task, {"raw": raw}, ks=(1,)).interpretability("raw", D)


def test_control_labels_are_at_chance(report):
    for arm, k in itertools.product(report.control, (1, 2, 5)):
        assert report.control[arm][k] == pytest.approx(0.5, abs=0.12)
    assert report.selectivity("true", 1) > 0.35


def test_a_control_task_is_what_a_probe_knows_by_heart(planted):
    """A stream that spells its row's type out: the dense probe learns any labels of the types."""
    made = np.random.default_rng(0)
    types = made.integers(0, 13, N_TRAIN + N_TEST)
    types[N_TRAIN : N_TRAIN + 9] = 99  # never fitted on, so nobody can know them
    one_hot = torch.from_numpy(np.eye(100)[types]).float()
    last = torch.rand(len(types), 1, generator=torch.Generator().manual_seed(5))
    x = torch.cat([one_hot, last], dim=1)
    y = (x[:, -1] > 0.5).numpy()
    sides = types[:N_TRAIN], types[N_TRAIN:]
    task = Task(x[:N_TRAIN], y[:N_TRAIN], x[N_TRAIN:], y[N_TRAIN:], np.arange(N_TEST), sides)
    result = probe(task, {"raw": raw})
    assert result.dense_control_task == pytest.approx(1.0)
    assert result.control_task["raw"][1] < 0.8  # one unit knows one type
    assert result.control_task["raw"][5] > result.control_task["raw"][1]
    assert result.control["raw"][5] == pytest.approx(0.5, abs=0.15)
    expected = result.arms["raw"][5].auc.value - result.control_task["raw"][5]
    assert result.selectivity("raw", 5) == expected
    without = probe(task._replace(types=None), {"raw": raw})
    assert (without.control_task, without.dense_control_task) == ({}, None)
    assert without.arms == result.arms
    assert without.control == result.control


def test_auc_is_the_share_of_ordered_pairs():
    generator = np.random.default_rng(0)
    score, y = generator.integers(5, size=43).astype(float), generator.random(43) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(score[y], score[~y])]
    assert auc(score, y) == pytest.approx(np.mean(pairs))
    assert np.isnan(auc(score, np.ones(43, bool)))


def test_intervals_resample_groups_and_not_rows():
    """Copies of a row in one group add nothing, so the interval stays as wide."""
    generator = np.random.default_rng(0)
    y = generator.random(97) < 0.5
    score = generator.normal(size=97) + y
    alone = auc_interval(score, y, np.arange(97), 0)
    copies = auc_interval(score.repeat(7), y.repeat(7), np.arange(97).repeat(7), 0)
    assert copies.high - copies.low == pytest.approx(alone.high - alone.low, rel=0.05)
    as_rows = auc_interval(score.repeat(7), y.repeat(7), np.arange(97 * 7), 0)
    assert as_rows.high - as_rows.low < 0.6 * (alone.high - alone.low)


def test_sparse_codes_are_the_dense_ones(planted):
    task, dictionary = planted
    codes = codes_of(dictionary)(task.test_x)
    dense = dictionary.encode_dense(task.test_x).numpy()
    assert np.allclose(codes.toarray(), dense, atol=1e-6)
    expected = dense[task.test_y].mean(0) - dense[~task.test_y].mean(0)
    assert np.allclose(mean_difference(codes, task.test_y), expected, atol=1e-6)
    assert np.allclose(columns(codes, np.array([3, 1])), dense[:, [3, 1]], atol=1e-6)


@pytest.mark.parametrize(("value", "n"), [(True, 307), (False, 0)])
def test_labels_of_one_class_are_refused(planted, value, n):
    task = planted[0]._replace(test_y=np.full(N_TEST, value))
    message = rf"labels to score on must have both classes, got {n} positive of 307; take another"
    with pytest.raises(ValueError, match=message):
        probe(task, {"raw": raw})
