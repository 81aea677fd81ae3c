"""Turning an array that exists already into a cache: embeddings of any model, one row each."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from activations_cache.builder import rank_of_this_process, write_shards
from activations_cache.checks import MonosemaError, Progress, require, silent
from activations_cache.config import SPLITS, Dtype
from activations_cache.manifest import Plan
from activations_cache.reader import ActivationCache, open_cache
from activations_cache.shard import Examples
from activations_cache.writer import CacheWriter

SHARES = (0.6, 0.3, 0.1)
"""Of explain, score and hold."""

EXAMPLES_AT_ONCE = 4096

_HASHED_BYTES = 1 << 26


@runtime_checkable
class Matrix(Protocol):
    """What NumPy's and Zarr's arrays have in common."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(row, d_model)."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of the numbers."""
        ...

    def __getitem__(self, rows: slice, /) -> ArrayLike:
        """Return some rows."""
        ...


class ArraySource:
    """Rows that are there already; each is an example with one position.

    Args:
        array: (row, d_model), any floating dtype; memory mapped as a rule.
        digest: What the array's content hashes to.
        hook_point: How the rows are called in the cache.
        dtype: Number format of the cache.
        rows_per_shard: Rows in one file.
    """

    def __init__(
        self,
        array: Matrix,
        digest: str,
        *,
        hook_point: str,
        dtype: Dtype,
        rows_per_shard: int,
    ) -> None:
        n_rows, d_model = array.shape
        self._array = array
        self._hook_point = hook_point
        self.examples = Examples(
            tokens=torch.zeros(n_rows, 1, dtype=torch.long),
            split=_splits(n_rows),
            source=torch.zeros(n_rows, dtype=torch.long),
            source_names=("array",),
        )
        self.plan = Plan(
            made_from={"array_sha256": digest},
            hook_points={hook_point: d_model},
            dtype=dtype,
            context=1,
            skip_positions=0,
            rows_per_shard=rows_per_shard,
            n_examples=n_rows,
            source_names=("array",),
        )

    def __call__(self, numbers: range) -> Mapping[str, Float[Tensor, "example pos _"]]:
        """Return some rows."""
        rows = np.array(self._array[numbers.start : numbers.stop], dtype=np.float32)
        return {self._hook_point: torch.from_numpy(rows)[:, None]}


def import_array(
    source: str | Path,
    path: str | Path,
    *,
    hook_point: str = "embedding:out",
    dtype: Dtype = "float32",
    rows_per_shard: int = 65536,
    progress: Progress | None = None,
) -> ActivationCache:
    """Turn a .npy file, a safetensors file with one matrix, or a Zarr array into a cache.

    Args:
        source: The array (row, d_model); of a safetensors file with several, `FILE::NAME`.
        path: The cache's directory.
        hook_point: How the rows are called there.
        dtype: Number format of the cache.
        rows_per_shard: Rows in one file.
        progress: Called with rows done and rows in all.

    Raises:
        FileNotFoundError: If there is no such array.
        ValueError: If it is no matrix of floating-point numbers, or its format is unknown.
    """
    progress = progress or silent
    array = open_array(str(source))
    given = ArraySource(
        array, _digest(array), hook_point=hook_point, dtype=dtype, rows_per_shard=rows_per_shard
    )
    rank, n_ranks = rank_of_this_process()
    with CacheWriter(Path(path), given.plan, rank=rank, progress=progress) as writer:
        write_shards(writer, given, EXAMPLES_AT_ONCE, n_ranks, progress)
        writer.finish({"array": Path(source).name})
    return open_cache(path)


def open_array(source: str) -> Matrix:
    """Open a matrix without reading it; arguments and errors as in `import_array`."""
    name, _, key = source.partition("::")
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"array {name} must exist, got no such file")
    if path.is_dir():
        array = _open_zarr(path)
    elif path.suffix == ".npy":
        array = np.lib.format.open_memmap(path, mode="r")
    elif path.suffix == ".safetensors":
        array = _open_safetensors(path, key)
    else:
        raise MonosemaError(
            f"array must be a .npy, a .safetensors or a Zarr directory, got {source}"
        )
    is_matrix = len(array.shape) == 2 and np.issubdtype(array.dtype, np.floating)
    is_matrix = is_matrix and 0 not in array.shape
    require(is_matrix, "array", "be a matrix (row, d_model) of floats", (array.shape, array.dtype))
    return array


def _open_zarr(path: Path) -> Matrix:
    import zarr  # slow to import

    try:
        return zarr.open_array(path, mode="r")  # pyright: ignore[reportReturnType]
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise MonosemaError(f"array {path} must be a Zarr array, got {error}") from error


def _open_safetensors(path: Path, key: str) -> Matrix:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = list(file.keys())
        if not key and len(names) != 1:
            listed = ", ".join(names)
            raise MonosemaError(
                f"{path} must hold one array, got {listed}; name one as {path}::NAME"
            )
        if key and key not in names:
            raise MonosemaError(f"{path} must hold the array {key}, got {', '.join(names)}")
        return file.get_tensor(key or names[0]).float().numpy()


def _digest(array: Matrix) -> str:
    """Hash shape, type and content."""
    digest = hashlib.sha256(f"{array.shape} {array.dtype}".encode())
    n_rows = max(1, _HASHED_BYTES // (array.shape[1] * array.dtype.itemsize))
    for start in range(0, array.shape[0], n_rows):
        digest.update(np.ascontiguousarray(array[start : start + n_rows]).data)
    return digest.hexdigest()


def _splits(n_rows: int) -> Tensor:
    """Deal the rows out to the splits, by a draw that depends on nothing but their numbers."""
    draw = torch.rand(n_rows, generator=torch.Generator().manual_seed(0))
    edges = torch.tensor(SHARES).cumsum(0)[: len(SPLITS) - 1]
    return torch.bucketize(draw, edges)
