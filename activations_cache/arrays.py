"""Arrays on disk, memory mapped shard by shard; each file is checked when it is first touched."""

import mmap
import tempfile
import threading
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped

from activations_cache import io
from activations_cache.errors import CacheFormatError
from activations_cache.journal import ShardRecord
from activations_cache.layout import ArraySpec
from activations_cache.storage import decompress


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
        self._open: dict[int, np.ndarray] = {}
        self._opening = threading.Lock()

    def shard(self, shard: int) -> Shaped[np.ndarray, "row ..."]:
        """Return a shard's chunk, unused tail included, as a read-only view of its file.

        Raises:
            CacheFormatError: At the first touch, if the file is missing or damaged.
        """
        if shard not in self._open:
            with self._opening:
                if shard not in self._open:
                    self._open[shard] = self._map(shard)
        return self._open[shard]

    def valid(self, shard: int) -> Shaped[np.ndarray, "row ..."]:
        """Return the part of a shard that holds something."""
        return self.shard(shard)[: self._records[shard].valid_rows]

    def take(self, rows: Int64[np.ndarray, " row"]) -> Shaped[np.ndarray, "row ..."]:
        """Return rows by their global numbers, in the order asked for."""
        shards, offsets = np.divmod(rows, self._spec.chunk[0])
        # 16 bits sort several times faster; beyond 65,536 shards a shard may be read in parts.
        order = shards.astype(np.uint16).argsort(kind="stable")
        shards, offsets = shards[order], offsets[order]
        bounds = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(rows)]
        found = np.empty((len(rows), *self._spec.chunk[1:]), self._spec.numpy)
        for start, stop in pairwise(bounds):
            if start < stop:  # "clip" writes straight into `found`; the offsets are in range
                chunk, part = self.shard(int(shards[start])), slice(start, stop)
                chunk.take(offsets[part], axis=0, out=found[part], mode="clip")
        back = np.empty_like(order)
        back[order] = np.arange(len(rows))
        return found.take(back, axis=0)

    def _map(self, shard: int) -> np.ndarray:
        name = self._spec.file(shard)
        expected = self._records[shard].files.get(name, {"bytes": self._spec.chunk_bytes})
        found = io.problem(self._path / name, expected)
        is_plain = not self._spec.is_compressed
        if found is None and is_plain and expected["bytes"] != self._spec.chunk_bytes:
            found = f"{name} must have {self._spec.chunk_bytes:,} bytes, got {expected['bytes']:,}"
        if found is not None:
            raise CacheFormatError(
                f"shard {shard} is damaged: {found}; remove manifest.json and build again, "
                "which writes only the damaged shards"
            )
        data = io.map_file(self._path / name)
        chunk = data if is_plain else _unpack(data, self._spec.chunk_bytes)
        return chunk.view(self._spec.numpy).reshape(self._spec.chunk)


def _unpack(packed: np.ndarray, n_bytes: int) -> np.ndarray:
    """Decompress into an unnamed temporary file, so that it costs page cache and no memory.

    The file lies where TMPDIR says, and goes with the process.
    """
    data = decompress(packed)
    if len(data) != n_bytes:
        raise CacheFormatError(f"a chunk must unpack to {n_bytes:,} bytes, got {len(data):,}")
    with tempfile.TemporaryFile(prefix="activations-") as file:
        file.write(data)
        file.flush()
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
