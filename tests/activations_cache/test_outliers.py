"""Rows of a hundred times the norm are named and left out; without such rows nothing changes."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from activations_cache.importing import import_array
from activations_cache.reader import ActivationCache
from activations_cache.summary import bounded, limits, looked_at, share_of_largest, within


def _cache(path: Path, *, large: bool) -> tuple[ActivationCache, np.ndarray]:
    rows = np.random.default_rng(0).normal(size=(3001, 7)).astype(np.float32) + 1
    if large:
        rows[::500] *= 100
    path.mkdir(exist_ok=True)
    np.save(path / "x.npy", rows)
    return import_array(path / "x.npy", path / "cache", dtype="float32"), rows


def test_large_rows_are_left_out_of_batches_and_statistics(tmp_path: Path):
    cache, _ = _cache(tmp_path, large=True)
    (hook,) = cache.hook_points
    rows_left = bounded(cache, (hook,), 10.0)
    every, left = cache.rows(("explain", "score")), rows_left.rows(("explain", "score"))
    norms = cache[hook].norms(every)
    assert left.tolist() == every[norms <= 10 * norms.median()].tolist()
    assert 0 < rows_left.n_left_out == len(every) - len(left) <= 7
    expected = cache[hook][left].double()
    torch.testing.assert_close(
        rows_left[hook].mean.double(), expected.mean(0), rtol=1e-4, atol=1e-4
    )
    square = float(expected.square().sum(1).mean())
    assert rows_left[hook].mean_square_norm == pytest.approx(square, rel=1e-5)
    assert cache[hook].mean_square_norm > 5 * square
    batches = list(rows_left.batches(batch=64, seed=3))
    assert len(batches) == rows_left.n_batches(batch=64)
    assert set(torch.cat([b.rows for b in batches]).tolist()) <= set(left.tolist())


def test_a_cache_of_rows_alike_stays_the_same_object(tmp_path: Path):
    cache, _ = _cache(tmp_path, large=False)
    assert bounded(cache, cache.hook_points, 10.0) is cache
    assert share_of_largest(cache, cache.hook_points[0]) < 0.01


def test_one_line_says_what_the_largest_rows_hold_and_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    cache, _ = _cache(tmp_path, large=True)
    with caplog.at_level(logging.INFO):
        rows_left = looked_at(cache, cache.hook_points, 10.0)
        assert looked_at(cache, cache.hook_points, None) is cache
    first, second = (record.getMessage() for record in caplog.records)
    assert "the largest 0.1 % of the rows hold" in first
    assert f"{rows_left.n_left_out} rows above 10 times the median norm are left out" in first
    assert "train.max_norm: 10 leaves them out" in second
    assert caplog.records[0].levelno == logging.WARNING


def test_rows_of_any_split_are_within_the_limit_that_held_in_a_training(tmp_path: Path):
    cache, _ = _cache(tmp_path, large=True)
    (hook,) = cache.hook_points
    kept = within(cache, (hook,), 10.0)
    limit = limits(cache, (hook,), 10.0)[hook]
    for split in ("explain", "score", "hold"):
        rows = cache.rows((split,))
        left = rows[cache[hook].norms(rows) <= limit]
        assert torch.equal(kept.rows((split,)), left)
    assert len(cache.rows()) - len(kept.rows()) == 7
    assert within(cache, (hook,), None) is cache
    alike, _ = _cache(tmp_path / "alike", large=False)
    assert within(alike, alike.hook_points, 10.0) is alike
