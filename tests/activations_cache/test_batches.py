"""Shuffled batches: each row once per epoch, the same from wherever one goes on."""

import gc
import itertools
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import activations_cache
from activations_cache import io
from activations_cache.batches import (
    BLOCK_ROWS,
    RowOrder,
    count_batches,
    n_readers,
    permutation,
    read_batches,
    row_order,
)
from activations_cache.checks import CacheFormatError
from activations_cache.reader import ActivationCache
from activations_cache.testing import synthetic_plan, write_synthetic

HOOKS = {"a.1:out": 7, "a.2:in": 5}
FIXED = [0, 3, 2, 9, 7, 4, 1, 12, 6, 11, 5, 10, 8]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """1,616 rows in 34 shards, 1,296 of them in explain and score."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "fsync", lambda descriptor: None)
        plan = synthetic_plan(HOOKS, n_examples=101)
        return write_synthetic(tmp_path_factory.mktemp("batches") / "cache", plan)


@st.composite
def orders(draw: st.DrawFn) -> RowOrder:
    """Any rows, cut into blocks of any lengths, with windows of any number of blocks."""
    n = draw(st.integers(1, 2000))
    inner = draw(st.sets(st.integers(1, max(1, n - 1)), max_size=40)) if n > 1 else set()
    starts = np.array(sorted({0, *inner}))
    rows = np.arange(n) * 3 + 1
    window, seed = draw(st.integers(1, 50)), draw(st.integers(0, 2**64 - 1))
    return RowOrder(rows, starts, window=window, seed=seed)


@settings(max_examples=60, deadline=None)
@given(order=orders(), data=st.data())
def test_each_epoch_is_a_permutation_whatever_the_pieces(order: RowOrder, data: st.DataObject):
    n = len(order)
    for epoch in (0, 3):
        whole = order.take(epoch * n, (epoch + 1) * n)
        assert np.array_equal(np.sort(whole), order.rows)
    both = order.take(0, 2 * n)
    start = data.draw(st.integers(0, 2 * n))
    stop = data.draw(st.integers(start, 2 * n))
    assert np.array_equal(order.take(start, stop), both[start:stop])


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 2000), seed=st.integers(0, 2**64 - 1), stream=st.integers(0, 2**40 - 1))
def test_a_permutation_has_every_number_once(n: int, seed: int, stream: int):
    assert np.array_equal(np.sort(permutation(n, seed, 5, stream)), np.arange(n))


def test_the_permutation_is_fixed_for_all_time():
    assert permutation(13, 0, 0, 0).tolist() == FIXED
    assert permutation(13, 0, 1, 0).tolist() != FIXED
    assert permutation(13, 0, 0, 1).tolist() != FIXED
    assert permutation(13, 1, 0, 0).tolist() != FIXED


def test_places_in_a_permutation_are_uniform():
    # 4,000 permutations of 5: each (place, number) has mean 800 and standard deviation 25.3.
    counts = np.zeros((5, 5))
    for seed in range(4000):
        counts[np.arange(5), permutation(5, seed, 0, 0)] += 1
    assert np.abs(counts - 800).max() < 5 * 25.3


def test_rows_are_read_within_a_window_of_blocks():
    rows = np.arange(10 * BLOCK_ROWS + 100)
    starts = np.arange(0, len(rows), BLOCK_ROWS)
    order = RowOrder(rows, starts, window=4, seed=1)
    read = order.take(0, len(rows)) // BLOCK_ROWS
    first = read[: 2 * BLOCK_ROWS + 100]  # what three blocks hold at least
    assert len(set(first.tolist())) == 3
    assert sorted(set(read.tolist())) == list(range(11))
    windows = [order.blocks(0, window) for window in range(3)]
    assert [len(window) for window in windows] == [3, 4, 4]
    assert sorted(np.concatenate(windows).tolist()) == list(range(11))


def test_blocks_and_rows_within_them_come_in_another_order_each_epoch():
    n = 1000
    by_blocks = RowOrder(np.arange(n), np.arange(n), window=1, seed=1)  # a row is a block
    within = RowOrder(np.arange(n), np.array([0]), window=1, seed=1)  # all rows are one block
    for order in (by_blocks, within):
        first, second, third = (order.take(i * n, (i + 1) * n) for i in range(3))
        for one, other in ((first, second), (first, third), (second, third)):
            assert (one == other).sum() < 12  # of 1,000 by chance: one, give or take one


def test_neighbours_in_the_order_have_nothing_to_do_with_each_other():
    n = 300_007
    order = row_order(np.arange(n), seed=2).take(0, n)
    noise = 4 / np.sqrt(n)  # four standard errors of a correlation of independent numbers
    for value in (order, order // 255, order % 255):
        for lag in (1, 2, 1024):
            correlation = np.corrcoef(value[:-lag], value[lag:])[0, 1]
            assert abs(correlation) < noise + 0.002
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.05
    neighbours = (np.abs(np.diff(order)) == 1).mean()
    assert neighbours < 1e-4


def test_a_batch_has_rows_of_many_examples():
    order = row_order(np.arange(300_007), seed=2)
    for start in (0, 131_072, 290_000):
        examples = order.take(start, start + 1024) // 255
        assert len(np.unique(examples)) > 400  # of 586 in the window


def test_each_row_of_the_splits_comes_once_per_epoch_with_its_own_values(cache: ActivationCache):
    wanted = cache.rows(("explain", "score"))
    batches = list(cache.batches(batch=27, seed=5, epochs=2))
    assert len(batches) == cache.n_batches(batch=27, epochs=2) == 2 * 1296 // 27
    rows = torch.cat([batch.rows for batch in batches])
    for epoch in rows.split(1296):
        assert torch.equal(epoch.sort().values, wanted)
    assert not torch.equal(rows[:1296], rows[1296:])
    both = torch.cat([cache[name][rows] for name in HOOKS], dim=1)
    assert torch.equal(torch.cat([batch.x for batch in batches]), both)


def test_hook_points_stand_side_by_side_as_named(cache: ActivationCache):
    for names in (["a.2:in"], ["a.2:in", "a.1:out"]):
        first = next(iter(cache.batches(names, batch=11, seed=0)))
        assert first.x.shape == (11, sum(HOOKS[name] for name in names))
        assert first.x.dtype == torch.float32
        assert torch.equal(first.x, torch.cat([cache[name][first.rows] for name in names], dim=1))


def test_going_on_at_every_batch_gives_the_same_rest(cache: ActivationCache):
    def rows(start: int) -> list[list[int]]:
        batches = cache.batches(["a.1:out"], batch=101, seed=9, start=start, epochs=3)
        return [batch.rows.tolist() for batch in batches]

    whole = rows(0)
    assert len(whole) == 38
    for start in range(39):
        assert rows(start) == whole[start:]
        assert cache.n_batches(batch=101, start=start, epochs=3) == 38 - start


@pytest.mark.parametrize(
    ("at_once", "read"),
    [(0, [7] * 11), (2 * 84, [7, *[14] * 5]), (3 * 84, [7, 21, 21, 21, 7]), (10**9, [7, 70])],
)
def test_several_small_batches_are_read_at_once(at_once: int, read: list[int]):
    order, sizes = row_order(np.arange(1000), seed=3), []

    def rows(numbers: np.ndarray) -> torch.Tensor:
        sizes.append(len(numbers))
        return torch.from_numpy(numbers)[:, None].float().expand(-1, 3).contiguous()

    numbers, part = range(5, 16), slice(2, 9)
    found = list(
        read_batches(order.take, rows, batch=13, numbers=numbers, part=part, at_once=at_once)
    )  # 7 of 13 rows: 84 bytes
    assert sizes == read
    wanted = [order.take(13 * n + 2, 13 * n + 9).tolist() for n in numbers]
    assert [batch.rows.tolist() for batch in found] == wanted
    assert [batch.x[:, 2].tolist() for batch in found] == wanted


def test_several_threads_give_what_one_gives_in_its_order():
    """However long each reading takes; there are as many of them at a time as there are threads."""
    order, begun, waiting = row_order(np.arange(1000), seed=3), [], threading.Barrier(3, timeout=60)

    def rows(numbers: np.ndarray) -> torch.Tensor:
        begun.append(threading.current_thread().name)
        if 1 < len(begun) <= 4:
            waiting.wait()  # three readings have begun before any of them ends
        if numbers[0] % 2:
            time.sleep(0.01)
        return torch.from_numpy(numbers)[:, None].float()

    def read(threads: int) -> list[list[int]]:
        batches = read_batches(
            order.take, rows, batch=13, numbers=range(40), at_once=0, threads=threads
        )
        return [batch.x[:, 0].long().tolist() for batch in batches]

    found = read(3)
    assert len(set(begun)) == 3
    assert found == [order.take(13 * n, 13 * n + 13).tolist() for n in range(40)]
    begun[:] = ["none"] * 9
    assert read(1) == found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_rows_as_stored_are_those_in_float32(dtype: str, tmp_path: Path):
    """Bit by bit; numbers that have a scale are read as float32."""
    plan = synthetic_plan(HOOKS, n_examples=23, dtype=dtype)
    cache = write_synthetic(tmp_path / "cache", plan)
    stored = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    for names in (["a.1:out"], ["a.2:in", "a.1:out"]):
        pairs = zip(
            cache.batches(names, batch=29, seed=2, as_stored=True),
            cache.batches(names, batch=29, seed=2),
            strict=True,
        )
        for low, plain in pairs:
            assert (low.x.dtype, plain.x.dtype) == (stored, torch.float32)
            assert torch.equal(low.rows, plain.rows)
            assert torch.equal(low.x.float(), plain.x)
            assert low.x.bfloat16().equal(plain.x.bfloat16())


def test_only_what_is_short_at_the_very_end_is_dropped(cache: ActivationCache):
    assert cache.n_batches(batch=1000) == 1
    assert cache.n_batches(batch=1000, epochs=4) == 5
    batches = list(cache.batches(batch=1000, seed=0, epochs=4))
    assert [len(batch.x) for batch in batches] == [1000] * 5


def test_seed_and_epoch_change_the_order_and_nothing_else(cache: ActivationCache):
    def rows(**arguments: int) -> torch.Tensor:
        batches = cache.batches(["a.1:out"], batch=16, **arguments)
        return torch.cat([batch.rows for batch in batches])

    assert torch.equal(rows(seed=1), rows(seed=1))
    assert not torch.equal(rows(seed=1), rows(seed=2))
    assert torch.equal(rows(seed=1, epochs=2)[:1296], rows(seed=1))


def test_other_splits(cache: ActivationCache):
    batches = cache.batches(batch=4, seed=0, splits=("hold",))
    rows = torch.cat([batch.rows for batch in batches])
    assert torch.equal(rows.sort().values, cache.rows(("hold",)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"batch": 1297}, "batch must be at most the 1,296 rows of 1 epochs, got 1297; use"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"start": -1}, "start must be at least 0, got -1"),
        ({"start": 130}, "start must be at most the 129 batches there are, got 130"),
        ({"seed": -1}, "seed must be at least 0 and below"),
        ({"seed": 2**64}, "seed must be at least 0 and below"),
    ],
)
def test_an_argument_out_of_range_is_refused_at_once(
    cache: ActivationCache, arguments: dict[str, int], message: str
):
    with pytest.raises(ValueError, match=message):
        cache.batches(**({"batch": 10, "seed": 0} | arguments))
    with pytest.raises(KeyError, match="hook point must be one of"):
        cache.batches(["b:out"], batch=10, seed=0)


def test_no_thread_is_left_however_the_loop_ends(cache: ActivationCache):
    before = set(threading.enumerate())  # an iterator of another test may wait for its collection

    def readers() -> int:
        new = set(threading.enumerate()) - before
        return sum(thread.name.startswith("activations") for thread in new)

    list(cache.batches(batch=100, seed=0))
    assert readers() == 0
    batches = cache.batches(batch=100, seed=0)
    next(iter(batches))
    assert 1 <= readers() <= n_readers()
    del batches
    gc.collect()
    assert readers() == 0
    for _ in itertools.islice(cache.batches(batch=100, seed=0), 3):
        pass
    gc.collect()
    assert readers() == 0


def test_a_damaged_shard_ends_the_loop_with_its_name(cache: ActivationCache, tmp_path: Path):
    copy = Path(shutil.copytree(cache.path, tmp_path / "copy"))
    (copy / "a.1:out/acts/c/20/0").unlink()
    with pytest.raises(CacheFormatError, match="shard 20 is damaged"):
        list(activations_cache.open(copy).batches(batch=10, seed=0))


def test_count_batches_is_what_a_loop_would_count():
    for n_rows, batch, epochs in itertools.product(range(1, 30), range(1, 8), range(1, 4)):
        expected = n_rows * epochs // batch
        if expected:
            assert count_batches(n_rows, batch=batch, epochs=epochs) == expected
