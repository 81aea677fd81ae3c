"""Row numbers, and the rows of one hook point behind them."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from activations_cache import io
from activations_cache.arrays import ShardedArray
from activations_cache.errors import CacheFormatError
from activations_cache.journal import ShardRecord
from activations_cache.layout import HookArrays
from activations_cache.manifest import HookStatistics, Manifest
from activations_cache.storage import read_into

RowIds = Int[Tensor, " row"] | slice
"""Global row numbers; a slice means the valid rows among the numbers that it covers."""

_BYTES_AT_ONCE = 1 << 20
"""Of float32: so few that rows are still in the processor's cache when they are made it."""


class RowGrid:
    """Which row numbers hold something: shard * capacity + offset, below the shard's valid rows.

    Args:
        records: The journal's records of all shards.
        capacity: Rows that a shard can hold.
    """

    def __init__(self, records: Mapping[int, ShardRecord], capacity: int) -> None:
        self.capacity = capacity
        self._valid_rows = np.array([record.valid_rows for record in records.values()])

    def numbers(self, rows: RowIds) -> Int64[np.ndarray, " row"]:
        """Return row numbers as an array, after checking that each of them holds something.

        Raises:
            IndexError: If one does not.
        """
        n_numbers = len(self._valid_rows) * self.capacity
        if isinstance(rows, slice):
            numbers = np.arange(*rows.indices(n_numbers))
            return numbers[self._is_valid(numbers)]
        numbers = rows.numpy().astype(np.int64, copy=False)
        inside = (numbers >= 0) & (numbers < n_numbers)
        if inside.all() and (inside := self._is_valid(numbers)).all():
            return numbers
        wrong = numbers[~inside][0]
        raise IndexError(f"rows must be numbers that cache.rows() gives, got {wrong}")

    def _is_valid(self, numbers: Int64[np.ndarray, " row"]) -> Bool[np.ndarray, " row"]:
        shards, offsets = np.divmod(numbers, self.capacity)
        return offsets < self._valid_rows[shards]


class HookRows:
    """The rows of one hook point, and their statistics over the splits explain and score.

    Args:
        name: The hook point.
        path: The cache.
        manifest: Its manifest.
        specs: Where this hook point's arrays are.
        arrays: The cache's arrays by path.
        grid: Its row numbers.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        manifest: Manifest,
        specs: HookArrays,
        arrays: Mapping[str, ShardedArray],
        grid: RowGrid,
    ) -> None:
        self.name = name
        self.d_model = manifest.plan.hook_points[name]
        self.statistics: HookStatistics = manifest.statistics[name]
        self._dtype = manifest.plan.dtype
        self._acts = arrays[specs.acts.path]
        self._scale = arrays[specs.scale.path] if specs.scale else None
        self._norm = arrays[specs.norm.path]
        self._mean_file = path / specs.mean.file(0)
        self._mean_expected = manifest.files[specs.mean.file(0)]
        self._mean_dtype = specs.mean.numpy
        self._grid = grid

    def __getitem__(self, rows: RowIds) -> Float[Tensor, "row d_model"]:
        """Return rows as float32, in the order asked for.

        Raises:
            IndexError: If a number is not that of a valid row.
            CacheFormatError: If a file that is touched for the first time is damaged.
        """
        return self.gather(self._grid.numbers(rows))

    def gather(self, numbers: Int64[np.ndarray, " row"]) -> Float[Tensor, "row d_model"]:
        """Return rows by numbers that are known to be valid."""
        found = torch.empty(len(numbers), self.d_model)
        at_once = max(_BYTES_AT_ONCE // (4 * self.d_model), 1)
        for first in range(0, len(numbers), at_once):
            part = numbers[first : first + at_once]
            scale = None if self._scale is None else self._scale.take(part)
            read_into(found[first : first + len(part)], self._acts.take(part), scale, self._dtype)
        return found

    def norms(self, rows: RowIds) -> Float[Tensor, " row"]:
        """Return the Euclidean norms of rows without reading the rows."""
        return torch.from_numpy(self._norm.take(self._grid.numbers(rows)))

    @cached_property
    def mean(self) -> Float[Tensor, " d_model"]:
        """The mean row, float32."""
        if found := io.problem(self._mean_file, self._mean_expected):
            raise CacheFormatError(f"the mean of {self.name} is damaged: {found}")
        values = io.map_file(self._mean_file).view(self._mean_dtype)
        return torch.from_numpy(values.astype(np.float32))

    @property
    def mean_square_norm(self) -> float:
        """The mean of the rows' squared norms."""
        return self.statistics.mean_square_norm
