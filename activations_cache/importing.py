"""Turning rows that exist already into a cache: an array, or what an inference server wrote.

An array has embeddings of any model, one row each. vLLM writes a file per request
(`extract_hidden_states`): `hidden_states` (token, layer, d_model) and `token_ids` (token).
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from activations_cache.builder import rank_of_this_process, write_shards
from activations_cache.checks import MonosemaError, Progress, require, silent
from activations_cache.config import SPLITS, Dtype
from activations_cache.corpus import hashed
from activations_cache.manifest import Plan
from activations_cache.reader import ActivationCache, open_cache
from activations_cache.shard import Examples
from activations_cache.text import NO_TOKEN
from activations_cache.writer import CacheWriter

SHARES = (0.6, 0.3, 0.1)
"""Of explain, score and hold."""

EXAMPLES_AT_ONCE, REQUESTS_AT_ONCE = 4096, 16

SINKS = 1
"""Positions at the start of a request that give no row."""

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

    A directory of safetensors files with `hidden_states` is what vLLM wrote for each request; the
    first position of a request gives no row there.

    Args:
        source: The array (row, d_model); of a safetensors file with several, `FILE::NAME`.
        path: The cache's directory.
        hook_point: How the rows are called there; of hidden states a name for each layer, with
            commas between them.
        dtype: Number format of the cache.
        rows_per_shard: Rows in one file.
        progress: Called with rows done and rows in all.

    Raises:
        FileNotFoundError: If there is no such array.
        ValueError: If it is no matrix of floating-point numbers, or its format is unknown.
    """
    progress = progress or silent
    given: ArraySource | RequestSource
    if files := requests_in(Path(source)):
        names, at_once = tuple(hook_point.split(",")), REQUESTS_AT_ONCE
        given = RequestSource(files, names, dtype=dtype, rows_per_shard=rows_per_shard)
    else:
        array, at_once = open_array(str(source)), EXAMPLES_AT_ONCE
        given = ArraySource(
            array, _digest(array), hook_point=hook_point, dtype=dtype, rows_per_shard=rows_per_shard
        )
    rank, n_ranks = rank_of_this_process()
    with CacheWriter(Path(path), given.plan, rank=rank, progress=progress) as writer:
        write_shards(writer, given, at_once, n_ranks, progress)
        writer.finish({"array": Path(source).name})
    return open_cache(path)


class RequestSource:
    """Hidden states that an inference server wrote, a file per request; each is an example.

    Args:
        files: The requests, by name.
        hook_points: How the layers are called in the cache, in the order of the files.
        dtype: Number format of the cache.
        rows_per_shard: Rows in one file.

    Raises:
        MonosemaError: If a file is not what the first one is, or has another number of layers.
    """

    def __init__(
        self, files: Sequence[Path], hook_points: tuple[str, ...], *, dtype: Dtype,
        rows_per_shard: int,
    ) -> None:  # fmt: skip
        self._files, self._hook_points = files, hook_points
        self._shape = (len(hook_points), self._read(files[0])[0].shape[-1])
        digest, ids = hashlib.sha256(), []
        for file in files:
            states, tokens = self._read(file)
            digest.update(tokens.long().numpy().tobytes())
            digest.update(states.contiguous().view(torch.uint8).numpy().tobytes())
            ids.append(tokens.long())
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=NO_TOKEN)
        longest = tokens.shape[1]
        require(longest > SINKS, "token_ids", f"be more than {SINKS} in a request", longest)
        self.examples = Examples(
            tokens=tokens,
            split=_dealt([int.from_bytes(hashed(one.tolist())) / 2**64 for one in ids]),
            source=torch.zeros(len(files), dtype=torch.long),
            source_names=("requests",),
        )
        self.plan = Plan(
            made_from={"requests_sha256": digest.hexdigest()},
            hook_points=dict.fromkeys(hook_points, self._shape[1]),
            dtype=dtype,
            context=longest,
            skip_positions=SINKS,
            rows_per_shard=max(rows_per_shard, longest),
            n_examples=len(files),
            source_names=("requests",),
        )

    def __call__(self, numbers: range) -> Mapping[str, Float[Tensor, "example pos _"]]:
        """Return the states of some requests, 0 where there is padding."""
        read = [self._read(file)[0] for file in self._files[numbers.start : numbers.stop]]
        shape = (len(read), self.plan.context, *self._shape)
        states = torch.zeros(shape, dtype=read[0].dtype)
        for number, of_one in enumerate(read):
            states[number, : len(of_one)] = of_one
        return dict(zip(self._hook_points, states.unbind(dim=2), strict=True))

    def _read(self, file: Path) -> tuple[Float[Tensor, "pos layer d_model"], Int[Tensor, " pos"]]:
        """Return the states and the token ids of a request."""
        try:
            found = load_file(file)
        except SafetensorError as error:
            raise MonosemaError(f"{file} must be a whole safetensors file, got {error}") from error
        states, ids = (found.get(name) for name in ("hidden_states", "token_ids"))
        n = len(self._hook_points)
        width = getattr(self, "_shape", (n, None))[1]
        if (
            states is None
            or ids is None
            or states.dim() != 3
            or states.shape[:2] != (len(ids), n)
            or width not in (None, states.shape[2])
        ):
            shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
            raise MonosemaError(
                f"{file} must hold hidden_states (token, {n} layers as hook points are named, "
                f"{width or 'd_model'}) and token_ids (token), got {shapes}"
            )
        return states, ids


def requests_in(path: Path) -> list[Path]:
    """Return the files of a directory of requests, by name; none where it is something else."""
    if not path.is_dir() or (path / "zarr.json").exists():
        return []
    return sorted(path.glob("*.safetensors"))


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
    return _dealt(torch.rand(n_rows, generator=torch.Generator().manual_seed(0)).tolist())


def _dealt(drawn: Sequence[float]) -> Tensor:
    """The splits of numbers between 0 and 1."""
    edges = torch.tensor(SHARES).cumsum(0)[: len(SPLITS) - 1]
    return torch.bucketize(torch.tensor(drawn), edges)
