"""Shuffled batches of rows, the next ones read ahead by threads.

The order in which rows are read: a pure function of seed, epoch and position.

Rows are cut into blocks of neighbours. The blocks are permuted, and then the rows inside each
window of consecutive permuted blocks. So a batch mixes rows from everywhere, while what is read
at a time stays within a window, and going on from any position needs no state.
"""

import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from monosema.checks import MonosemaError

_BLOCKS = 0
"""Stream number of the permutation of blocks; window w has stream number w + 1."""


class RowWindow(NamedTuple):
    """Blocks whose rows are mixed with each other."""

    epoch: int
    number: int


class RowOrder:
    """A different permutation of the same rows for each epoch.

    Args:
        rows: What is permuted, neighbours beside each other.
        starts: Where each block begins in `rows`; the first is 0.
        window: Blocks per window, at most.
        seed: At least 0, below 2**64.
    """

    def __init__(
        self,
        rows: Int64[np.ndarray, " row"],
        starts: Int64[np.ndarray, " block"],
        *,
        window: int,
        seed: int,
    ) -> None:
        if not 0 <= seed < 2**64:
            raise MonosemaError(f"seed must be at least 0 and below 2**64, got {seed}")
        self.rows = rows
        self._ends = np.append(starts[1:], len(rows))
        self._starts = starts
        # As few windows as possible, of equal size: a short one would mix its rows badly.
        n_windows = -(-len(starts) // window)
        self._windows = np.arange(n_windows + 1) * len(starts) // max(n_windows, 1)
        self._seed = seed
        # Bounded caches of pure functions: neighbours in the order share an epoch and a window.
        self._epoch = lru_cache(maxsize=2)(self._epoch_uncached)
        self.window_rows = lru_cache(maxsize=2)(self._window_rows_uncached)

    def __len__(self) -> int:
        """Return the number of rows in an epoch."""
        return len(self.rows)

    def take(self, start: int, stop: int) -> Int64[np.ndarray, " row"]:
        """Return the rows at the positions from start to stop, counted over all epochs."""
        spans = self.spans(start, stop)
        parts = [self.window_rows(*window)[inside] for window, inside in spans]
        return np.concatenate(parts) if parts else self.rows[:0]

    def spans(self, start: int, stop: int) -> list[tuple[RowWindow, slice]]:
        """Return the windows that lie between two positions, and which of their rows do."""
        found = []
        while start < stop:
            epoch, position = divmod(start, len(self))
            bounds = self._epoch(epoch)[1]
            window = int(np.searchsorted(bounds, position, side="right")) - 1
            n = min(stop - start, int(bounds[window + 1]) - position)
            first = position - int(bounds[window])
            found.append((RowWindow(epoch, window), slice(first, first + n)))
            start += n
        return found

    def after(self, window: RowWindow) -> RowWindow:
        """Return the window that follows another one, maybe in the next epoch."""
        is_last = window.number + 2 == len(self._windows)
        return (
            RowWindow(window.epoch + 1, 0)
            if is_last
            else RowWindow(window.epoch, window.number + 1)
        )

    def blocks(self, epoch: int, window: int) -> Int64[np.ndarray, " block"]:
        """Return the numbers of the blocks of a window."""
        return self._epoch(epoch)[0][self._windows[window] : self._windows[window + 1]]

    def _epoch_uncached(
        self, epoch: int
    ) -> tuple[Int64[np.ndarray, " block"], Int64[np.ndarray, " bound"]]:
        """Return the blocks in order and the position at which each window begins."""
        blocks = permutation(len(self._starts), self._seed, epoch, _BLOCKS)
        ends = np.cumsum([0, *(self._ends - self._starts)[blocks]])
        return blocks, ends[self._windows]

    def _window_rows_uncached(self, epoch: int, window: int) -> Int64[np.ndarray, " row"]:
        blocks = self.blocks(epoch, window)
        parts = [self.rows[self._starts[block] : self._ends[block]] for block in blocks]
        rows = np.concatenate(parts)
        return rows[permutation(len(rows), self._seed, epoch, window + 1)]


def permutation(n: int, seed: int, epoch: int, stream: int) -> Int64[np.ndarray, " n"]:
    """Return a permutation of 0..n-1 that is the same on every machine and NumPy version.

    NumPy promises the raw numbers of Philox, but not what `Generator.permutation` makes of them.
    So this sorts the indices by 32 random bits, in two passes of 16, for which NumPy has a fast
    stable sort; the few equal ones stay in order.
    """
    key = np.array([seed, (epoch << 40) + stream], np.uint64)
    raw = np.random.Philox(key=key).random_raw(n)
    order = np.argsort(raw.astype(np.uint16), kind="stable")
    high = (raw >> np.uint64(16)).astype(np.uint16)
    return order[np.argsort(high[order], kind="stable")]


BLOCK_ROWS = 256
"""Rows of a cache that stay together until the windows are permuted."""
WINDOW_BLOCKS = 1024
"""Blocks in a window, at most; windows are of equal size."""
READ_AT_ONCE = 4 << 20
"""Bytes that are read at a time where batches are smaller: Python's part of a reading takes turns
with the training step, and does not grow with the rows."""
READERS = 4
"""Threads that read a cache, if there are so many cores; one is slower than a GPU trains."""
ALL = slice(None)
"""All rows of a batch."""


class Batch(NamedTuple):
    """Rows for one training step."""

    x: Float[Tensor, "batch d_in"]
    """float32, or as the cache holds them where that was asked for; several hook points stand side
    by side in the order in which they were named."""
    rows: Int[Tensor, " batch"]
    """Their global row numbers."""


def row_order(rows: Int64[np.ndarray, " row"], seed: int) -> RowOrder:
    """Return the order in which a cache's rows are read."""
    starts = np.arange(0, len(rows), BLOCK_ROWS)
    return RowOrder(rows, starts, window=WINDOW_BLOCKS, seed=seed)


def count_batches(n_rows: int, *, batch: int, start: int = 0, epochs: int = 1) -> int:
    """Return how many batches are left after the first `start`.

    Epochs follow each other without a seam, so only what is short at the very end is dropped.

    Raises:
        ValueError: If an argument is out of range, or not even one batch can be filled.
    """
    for name, value, least in (("batch", batch, 1), ("epochs", epochs, 1), ("start", start, 0)):
        if value < least:
            raise MonosemaError(f"{name} must be at least {least}, got {value}")
    total = n_rows * epochs // batch
    if total == 0:
        raise MonosemaError(
            f"batch must be at most the {n_rows * epochs:,} rows of {epochs} epochs, got {batch}; "
            "use a smaller batch or more rows"
        )
    if start > total:
        raise MonosemaError(f"start must be at most the {total:,} batches there are, got {start:,}")
    return total - start


def n_readers() -> int:
    """Threads that read a cache: one a core of this process, and a few at most."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), READERS)
    return min(os.cpu_count() or 1, READERS)


def read_batches(
    take: Callable[[int, int], Int64[np.ndarray, " row"]],
    read: Callable[[Int64[np.ndarray, " row"]], Float[Tensor, "batch d_in"]],
    *,
    batch: int,
    numbers: range,
    part: slice = ALL,
    at_once: int = READ_AT_ONCE,
    threads: int = 1,
) -> Generator[Batch]:
    """Yield the batches with the given numbers; threads read the next ones meanwhile.

    Small batches are read several at a time, as views of the same memory. The threads end with the
    iterator, also when that is closed or dropped early.

    Args:
        take: Says which rows stand at the positions from one to another.
        read: Gives the rows' activations.
        batch: Rows per batch.
        numbers: Which batches, counted from the first of the first epoch.
        part: Which rows of each batch to read.
        at_once: Bytes to read at a time where that is more than one batch.
        threads: How many of these readings there are at a time.
    """
    first, last, _ = part.indices(batch)
    one_takes = Lock()  # or several threads would permute the same window

    def fetch(some: range) -> list[Batch]:
        with one_takes:
            found = [take(number * batch + first, number * batch + last) for number in some]
        x = read(np.concatenate(found))
        if torch.cuda.is_available() and not x.is_pinned():
            x = x.pin_memory()  # from there a copy to the device runs beside the training step
        parts = x.split([len(rows) for rows in found])
        return [Batch(x, torch.from_numpy(rows)) for x, rows in zip(parts, found, strict=True)]

    with ThreadPoolExecutor(threads, thread_name_prefix="activations") as readers:
        coming = deque([readers.submit(fetch, numbers[:1])] if numbers else [])
        rest = numbers[1:]
        while coming:
            ready = coming.popleft().result()
            n = max(at_once // max(ready[0].x.nbytes, 1), 1)
            while rest and len(coming) < threads:
                coming.append(readers.submit(fetch, rest[:n]))
                rest = rest[n:]
            yield from ready
