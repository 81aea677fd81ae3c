"""Shuffled batches of rows, one of them read ahead by a thread."""

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
) -> Iterator[Batch]:
    """Yield the batches with the given numbers; a thread reads the next one meanwhile.

    The thread ends with the iterator, also when that is closed or dropped early.

    Args:
        order: Which row stands where.
        read: Gives the rows' activations.
        batch: Rows per batch.
        numbers: Which batches, counted from the first of the first epoch.
        part: Which rows of each batch to read.
    """

    def fetch(number: int) -> Batch:
        first, last, _ = part.indices(batch)
        rows = order.take(number * batch + first, number * batch + last)
        x = read(rows)
        # From pinned memory a copy to the device runs beside the training step.
        return Batch(x.pin_memory() if torch.cuda.is_available() else x, torch.from_numpy(rows))

    with ThreadPoolExecutor(1, thread_name_prefix="activations") as reader:
        ahead = [reader.submit(fetch, number) for number in numbers[:1]]
        for following in range(numbers.start + 1, numbers.stop + 1):
            ready = ahead.pop().result()
            if following < numbers.stop:
                ahead.append(reader.submit(fetch, following))
            yield ready
