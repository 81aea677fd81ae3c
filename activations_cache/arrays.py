"""Arrays on disk, memory mapped shard by shard; each file is checked when it is first touched.

Files mapped one behind the other, so that the rows of many files are one array.
"""

import ctypes
import math
import mmap
import os
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Bool, Int, Int64, Shaped
from torch import Tensor

from activations_cache import io
from activations_cache.checks import CacheFormatError
from activations_cache.journal import ShardRecord
from activations_cache.layout import ArraySpec, decompress

RowIds = Int[Tensor, " row"] | slice
"""Global row numbers; a slice means the valid rows among the numbers that it covers."""

_MAP_FIXED = 0x10
"""Replace what is mapped there; Python does not name it. Linux, macOS and the BSDs agree."""


class AddressSpace:
    """Room in the address space for files of equal size; it costs no memory by itself.

    A file begins at a page and at a whole number of rows, so slot i begins at row i * stride.

    Args:
        n_slots: Files there can be.
        chunk: Shape of the array in each file; the first number is that of its rows.
        dtype: Its number format.

    Raises:
        MemoryError: If the process may not have so much address space.
    """

    def __init__(self, n_slots: int, chunk: tuple[int, ...], dtype: np.dtype) -> None:
        row_bytes = math.prod(chunk[1:]) * dtype.itemsize
        step = math.lcm(mmap.ALLOCATIONGRANULARITY, row_bytes) // row_bytes
        self.stride = -(-chunk[0] // step) * step
        self._chunk, self._slot_bytes = chunk, self.stride * row_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        size = n_slots * self._slot_bytes
        try:
            # Readable: an untouched page of it reads as zeros instead of ending the process.
            reserved = mmap.mmap(-1, size, flags=flags, prot=mmap.PROT_READ)
        except OSError as error:
            raise MemoryError(
                f"address space of {size:,} bytes must be free to map {n_slots} shards, got "
                f"{error}; raise the limit (ulimit -v)"
            ) from error
        flat = np.frombuffer(reserved, dtype)
        self._start = flat.ctypes.data
        self.rows: Shaped[np.ndarray, "row ..."] = flat.reshape(-1, *chunk[1:])

    def map(self, slot: int, file: IO[bytes]) -> None:
        """Put a file, which holds a whole chunk, into a slot, read only."""
        address = self._start + slot * self._slot_bytes
        n_bytes = os.fstat(file.fileno()).st_size
        flags = mmap.MAP_SHARED | _MAP_FIXED
        result = _mmap()(address, n_bytes, mmap.PROT_READ, flags, file.fileno(), 0)
        if result != address:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), file.name)

    def slot(self, slot: int) -> Shaped[np.ndarray, "row ..."]:
        """Return the array of the file in a slot."""
        first = slot * self.stride
        return self.rows[first : first + self._chunk[0]]


@cache
def _mmap() -> "ctypes._NamedFuncPointer":
    """Return the C library's mmap, which can say where; Python's cannot."""
    function = ctypes.CDLL(None, use_errno=True).mmap
    number, pointer = ctypes.c_int, ctypes.c_void_p
    function.argtypes = [pointer, ctypes.c_size_t, number, number, number, ctypes.c_longlong]
    function.restype = pointer
    return function


class ShardedArray:
    """One array of a cache, readable by row number; the reads are safe from several threads.

    Args:
        path: The cache.
        spec: The array.
        records: The journal's records of all shards.
    """

    def __init__(self, path: Path, spec: ArraySpec, records: Mapping[int, ShardRecord]) -> None:
        self._path = path
        self._spec = spec
        self._records = records
        self._space: AddressSpace | None = None
        self._is_open = np.zeros(max(records, default=-1) + 1, np.bool_)
        self._opening = threading.Lock()

    def shard(self, shard: int) -> Shaped[np.ndarray, "row ..."]:
        """Return a shard's chunk, unused tail included, as a read-only view of its file.

        Raises:
            CacheFormatError: At the first touch, if the file is missing or damaged.
        """
        if not self._is_open[shard]:
            with self._opening:
                if not self._is_open[shard]:
                    self._map(shard)
                    self._is_open[shard] = True
        assert self._space is not None
        return self._space.slot(shard)

    def valid(self, shard: int) -> Shaped[np.ndarray, "row ..."]:
        """Return the part of a shard that holds something."""
        return self.shard(shard)[: self._records[shard].valid_rows]

    def take(
        self, rows: Int64[np.ndarray, " row"], out: Shaped[np.ndarray, "row ..."] | None = None
    ) -> Shaped[np.ndarray, "row ..."]:
        """Return rows by their global numbers, in the order asked for; in `out` if it is given."""
        shards, offsets = np.divmod(rows, self._spec.chunk[0])
        for shard in np.unique(shards[~self._is_open[shards]]):
            self.shard(int(shard))
        if self._space is None:  # no rows were asked for
            return np.empty((0, *self._spec.chunk[1:]), self._spec.numpy)
        places = shards * self._space.stride + offsets
        # "raise", the default, copies once more; the numbers are in range.
        return self._space.rows.take(places, axis=0, mode="clip", out=out)

    def _map(self, shard: int) -> None:
        name = self._spec.file(shard)
        expected = self._records[shard].files.get(name, {"bytes": self._spec.chunk_bytes})
        result = io.problem(self._path / name, expected)
        is_plain = not self._spec.is_compressed
        if result is None and is_plain and expected["bytes"] != self._spec.chunk_bytes:
            result = f"{name} must have {self._spec.chunk_bytes:,} bytes, got {expected['bytes']:,}"
        if result is not None:
            raise CacheFormatError(
                f"shard {shard} is damaged: {result}; run `sae verify {self._path} --mend` and "
                "then the same command again: it writes only the damaged shards anew"
            )
        if self._space is None:
            self._space = AddressSpace(len(self._is_open), self._spec.chunk, self._spec.numpy)
        if is_plain:
            with (self._path / name).open("rb") as file:
                self._space.map(shard, file)
            return
        # Unnamed, so that it goes with the process; it costs page cache and no memory.
        with tempfile.TemporaryFile(prefix="activations-") as file:
            _unpack(io.map_file(self._path / name), self._spec.chunk_bytes, file)
            self._space.map(shard, file)


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


def _unpack(packed: np.ndarray, n_bytes: int, file: IO[bytes]) -> None:
    """Decompress a chunk into a file."""
    data = decompress(packed)
    if len(data) != n_bytes:
        raise CacheFormatError(f"a chunk must unpack to {n_bytes:,} bytes, got {len(data):,}")
    file.write(data)
    file.flush()
