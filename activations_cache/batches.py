"""Shuffled batches of rows, the next ones read ahead by a thread."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from activations_cache.order import RowOrder

BLOCK_ROWS = 256
"""Rows of a cache that stay together until the windows are permuted."""
WINDOW_BLOCKS = 1024
"""Blocks in a window, at most; windows are of equal size."""
READ_AT_ONCE = 4 << 20
"""Bytes that are read at a time where batches are smaller: Python's part of a reading takes turns
with the training step, and does not grow with the rows."""
ALL = slice(None)
"""All rows of a batch."""


class Batch(NamedTuple):
    """Rows for one training step."""

    x: Float[Tensor, "batch d_in"]
    """float32; several hook points stand side by side in the order in which they were named."""
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
            raise ValueError(f"{name} must be at least {least}, got {value}")
    total = n_rows * epochs // batch
    if total == 0:
        raise ValueError(
            f"batch must be at most the {n_rows * epochs:,} rows of {epochs} epochs, got {batch}; "
            "use a smaller batch or more rows"
        )
    if start > total:
        raise ValueError(f"start must be at most the {total:,} batches there are, got {start:,}")
    return total - start


def read_batches(
    order: RowOrder,
    read: Callable[[Int64[np.ndarray, " row"]], Float[Tensor, "batch d_in"]],
    *,
    batch: int,
    numbers: range,
    part: slice = ALL,
    at_once: int = READ_AT_ONCE,
) -> Iterator[Batch]:
    """Yield the batches with the given numbers; a thread reads the next ones meanwhile.

    Small batches are read several at a time, as views of the same memory. The thread ends with the
    iterator, also when that is closed or dropped early.

    Args:
        order: Which row stands where.
        read: Gives the rows' activations.
        batch: Rows per batch.
        numbers: Which batches, counted from the first of the first epoch.
        part: Which rows of each batch to read.
        at_once: Bytes to read at a time where that is more than one batch.
    """
    first, last, _ = part.indices(batch)

    def fetch(some: range) -> list[Batch]:
        if not some:
            return []
        found = [order.take(number * batch + first, number * batch + last) for number in some]
        x = read(np.concatenate(found))
        # From pinned memory a copy to the device runs beside the training step.
        x = x.pin_memory() if torch.cuda.is_available() else x
        parts = x.split([len(rows) for rows in found])
        return [Batch(x, torch.from_numpy(rows)) for x, rows in zip(parts, found, strict=True)]

    with ThreadPoolExecutor(1, thread_name_prefix="activations") as reader:
        coming, rest = reader.submit(fetch, numbers[:1]), numbers[1:]
        while ready := coming.result():
            n = max(at_once // max(ready[0].x.nbytes, 1), 1)
            coming, rest = reader.submit(fetch, rest[:n]), rest[n:]
            yield from ready
