"""Reading a cache: rows by number, where they come from, shuffled batches.

Row numbers, and the rows of one hook point behind them.
"""

from collections.abc import Generator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from activations_cache import io
from activations_cache.arrays import RowGrid, RowIds, ShardedArray
from activations_cache.batches import (
    ALL,
    Batch,
    count_batches,
    n_readers,
    read_batches,
    row_order,
)
from activations_cache.checks import CacheFormatError, HookPointError, MonosemaError, Progress
from activations_cache.config import SPLITS, TRAINING_SPLITS
from activations_cache.journal import ShardRecord, first_difference, journals_at, newest
from activations_cache.layout import (
    STORAGE,
    HookArrays,
    bits,
    layout_of,
    read_into,
    require_complete,
)
from activations_cache.manifest import HookStatistics, Manifest, read_manifest, read_plan
from activations_cache.seals import verify
from activations_cache.shard import Examples, is_in

_BYTES_AT_ONCE = 1 << 20
"""Of float32: so few that rows are still in the processor's cache when they are made it."""


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
        numbers = self._grid.numbers(rows)
        out = torch.empty(len(numbers), self.d_model)
        self.gather(numbers, out)
        return out

    @property
    def stored(self) -> torch.dtype:
        """The number format in which the cache holds rows; float32 where they have a scale."""
        return STORAGE[self._dtype][0]

    def gather(self, numbers: Int64[np.ndarray, " row"], out: Float[Tensor, "row d_model"]) -> None:
        """Put rows, by numbers that are known to be valid, into `out`: float32, or as stored."""
        if self._scale is None and out.dtype == self.stored:
            self._acts.take(numbers, bits(out))
            return
        at_once = max(_BYTES_AT_ONCE // (4 * self.d_model), 1)
        for first in range(0, len(numbers), at_once):
            part = numbers[first : first + at_once]
            scale = None if self._scale is None else self._scale.take(part)
            read_into(out[first : first + len(part)], self._acts.take(part), scale, self._dtype)

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


class RowRefs(NamedTuple):
    """Where rows come from."""

    example: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    token: Int[Tensor, " row"]


class ActivationCache:
    """A complete cache, open for reading; made by `open`.

    A row's global number is shard * rows_per_shard + its offset in the shard. Numbers are not
    contiguous, because a shard may have an unused tail: take them from `rows`.
    """

    def __init__(self, path: Path, manifest: Manifest, records: Mapping[int, ShardRecord]) -> None:
        self.path = path
        self.manifest = manifest
        self.identity: dict[str, Any] = manifest.plan.identity
        self.fingerprint: str = manifest.plan.fingerprint
        self.hook_points: tuple[str, ...] = tuple(manifest.plan.hook_points)
        self.n_rows = manifest.n_rows
        self._records = records
        self._layout = layout_of(manifest.plan)
        self._arrays = {
            spec.path: ShardedArray(path, spec, records) for spec in self._layout.per_shard()
        }
        self._grid = RowGrid(records, manifest.plan.rows_per_shard)
        self._rows_of: dict[tuple[str, ...], Int64[Tensor, " row"]] = {}
        self._hooks = {
            name: HookRows(name, path, manifest, specs, self._arrays, self._grid)
            for name, specs in self._layout.hooks.items()
        }

    def __getitem__(self, hook_point: str) -> HookRows:
        """Return the rows of a hook point.

        Raises:
            KeyError: If the cache does not have it.
        """
        if hook_point not in self._hooks:
            raise HookPointError(
                f"hook point must be one of {', '.join(self.hook_points)}, got {hook_point!r}"
            )
        return self._hooks[hook_point]

    def concatenated(self, hook_points: Sequence[str]) -> "ActivationCache":
        """Return the cache as a dictionary of these hook points reads it: as one wide stream.

        Asked for any of these, it gives all of them, side by side; of another its own rows.

        Raises:
            KeyError: If the cache does not have one of them.
        """
        return ConcatenatedCache(self, tuple(hook_points))

    def d_model(self, hook_point: str) -> int:
        """Return the width of a hook point's rows."""
        return self[hook_point].d_model

    def rows(self, splits: Sequence[str] = SPLITS) -> Int64[Tensor, " row"]:
        """Return the numbers of all valid rows of the named splits, ascending."""
        key = tuple(splits)
        if unknown := [name for name in key if name not in SPLITS]:
            raise MonosemaError(f"splits must be among {', '.join(SPLITS)}, got {unknown[0]!r}")
        if key not in self._rows_of:
            split, example = self.examples.split, self._arrays["rows/example"]
            parts = []
            for shard in self._records:
                wanted = is_in(split[torch.from_numpy(example.valid(shard).astype(np.int64))], key)
                parts.append(wanted.nonzero().flatten() + shard * self._grid.capacity)
            self._rows_of[key] = torch.cat(parts)
        return self._rows_of[key]

    def refs(self, rows: RowIds) -> RowRefs:
        """Return the example, the position in it and the token id of rows."""
        numbers = self._grid.numbers(rows)
        return RowRefs(*(self._int(f"rows/{name}", numbers) for name in RowRefs._fields))

    def is_special(self, rows: RowIds) -> Bool[Tensor, " row"]:
        """Say of each row whether its token is a special one of the tokenizer.

        A cache that was built before this was recorded says of none that it is.
        """
        special = self.manifest.provenance.get("special_tokens", [])
        return torch.isin(self.refs(rows).token, torch.tensor(special, dtype=torch.int64))

    @property
    def examples(self) -> Examples:
        """What the model read."""
        return self._examples

    @cached_property
    def _examples(self) -> Examples:
        values = {
            name: self._examples_array(spec.path) for name, spec in self._layout.examples.items()
        }
        plan = self.manifest.plan
        return Examples(**values, source_names=plan.source_names, label_names=plan.label_names)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels; empty where the text has none."""
        return self.manifest.plan.label_names

    def token_labels(self, rows: RowIds) -> Int[Tensor, " row"]:
        """Return the label of each row's token as an index into `label_names`, -1 where none."""
        refs = self.refs(rows)
        if self.examples.label is None:
            return torch.full_like(refs.token, -1)
        return self.examples.label[refs.example, refs.position]

    def batches(  # noqa: PLR0913
        self,
        hook_points: Sequence[str] | None = None,
        *,
        batch: int,
        seed: int,
        splits: Sequence[str] = TRAINING_SPLITS,
        start: int = 0,
        epochs: int = 1,
        part: slice = ALL,
        as_stored: bool = False,
    ) -> Generator[Batch]:
        """Yield shuffled batches: each valid row of the splits once per epoch.

        The order is a pure function of seed, epoch and position. Epochs follow each other without
        a seam; only what does not fill a batch at the very end is dropped.

        Args:
            hook_points: Which, side by side; all by default.
            batch: Rows per batch.
            seed: Decides the order, together with the rows themselves.
            splits: From which examples.
            start: Batches to leave out at the start, because they were used already.
            epochs: How often each row comes.
            part: Which rows of each batch to read, for one of several processes that share them.
            as_stored: Give rows in the cache's number format instead of float32: half the bytes of
                bfloat16 on their way to a GPU, where they are made float32 without loss.

        Raises:
            ValueError: If an argument is out of range.
        """
        rows = self.rows(splits).numpy()
        count_batches(len(rows), batch=batch, start=start, epochs=epochs)
        hooks = [self[name] for name in hook_points or self.hook_points]
        total = count_batches(len(rows), batch=batch, epochs=epochs)
        widths = [hook.d_model for hook in hooks]
        dtype = hooks[0].stored if as_stored else torch.float32

        def read(numbers: Int64[np.ndarray, " row"]) -> Float[Tensor, "row d_in"]:
            pinned = torch.cuda.is_available()
            found = torch.empty(len(numbers), sum(widths), dtype=dtype, pin_memory=pinned)
            for hook, columns in zip(hooks, found.split(widths, dim=1), strict=True):
                hook.gather(numbers, columns)
            return found

        take, numbers, threads = row_order(rows, seed).take, range(start, total), n_readers()
        return read_batches(take, read, batch=batch, numbers=numbers, part=part, threads=threads)

    @property
    def n_bytes(self) -> int:
        """Size of the shards' files."""
        files = (file for record in self._records.values() for file in record.files.values())
        return sum(int(file["bytes"]) for file in files)

    def n_batches(
        self,
        *,
        batch: int,
        splits: Sequence[str] = TRAINING_SPLITS,
        start: int = 0,
        epochs: int = 1,
    ) -> int:
        """Return how many batches `batches` gives for the same arguments."""
        return count_batches(len(self.rows(splits)), batch=batch, start=start, epochs=epochs)

    def verify(self, progress: Progress | None = None) -> list[str]:
        """Return what is wrong with the files, one line for each problem; empty if nothing is."""
        return verify(self.path, self.manifest, self._records, progress)

    def _int(self, name: str, numbers: Int64[np.ndarray, " row"]) -> Int64[Tensor, " row"]:
        return torch.from_numpy(self._arrays[name].take(numbers).astype(np.int64))

    def _examples_array(self, path: str) -> Int64[Tensor, "example ..."]:
        chunks = [self._arrays[path].shard(shard) for shard in self._records]
        values = np.concatenate(chunks)[: self.manifest.plan.n_examples]
        return torch.from_numpy(values.astype(np.int64))


class ConcatenatedRows(NamedTuple):
    """The rows of several hook points, side by side."""

    hooks: tuple[HookRows, ...]

    def __getitem__(self, rows: RowIds) -> Float[Tensor, "row d_in"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.cat([hook[rows] for hook in self.hooks], dim=1)

    @property
    def d_model(self) -> int:
        """The width of all of them."""
        return sum(hook.d_model for hook in self.hooks)


class ConcatenatedCache(ActivationCache):
    """The same cache, where each of some hook points names all of them side by side."""

    def __init__(self, cache: ActivationCache, hook_points: tuple[str, ...]) -> None:
        vars(self).update(vars(cache))
        hooks = tuple(cache[name] for name in hook_points)
        self._joined = hook_points
        self._stream = hooks[0] if len(hooks) == 1 else ConcatenatedRows(hooks)

    def __getitem__(self, hook_point: str) -> HookRows | ConcatenatedRows:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the rows of the stream for each of its hook points; of another its own."""
        return self._stream if hook_point in self._joined else super().__getitem__(hook_point)


def open_cache(path: str | Path, *, expect: Mapping[str, Any] | None = None) -> ActivationCache:
    """Open a complete cache; `activations_cache.open` is this function.

    Args:
        path: The cache's directory.
        expect: Keys of the identity, nested as there, that must have these values.

    Raises:
        FileNotFoundError: If there is no such directory.
        CacheFormatError: If it is no cache, is unfinished, is damaged, was written by a newer
            version, or differs from `expect`.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} must be a directory with a cache, got no such directory")
    manifest = read_manifest(path)
    if manifest is None:
        raise CacheFormatError(_why_not_complete(path))
    if expect and (
        difference := first_difference(dict(expect), manifest.plan.identity, subset=True)
    ):
        raise CacheFormatError(
            f"{path} must be made from what is expected, got another {difference}; "
            "build that cache or pass its path"
        )
    return ActivationCache(path, manifest, _records(path, manifest))


def _records(path: Path, manifest: Manifest) -> dict[int, ShardRecord]:
    for name, expected in manifest.journals.items():
        if found := io.problem(path / name, expected):
            raise CacheFormatError(f"the journal is damaged: {found}")
    records = newest(path / name for name in manifest.journals)
    if list(records) != list(range(len(records))) or len(records) != manifest.plan.n_shards:
        raise CacheFormatError(
            f"{path} must list {manifest.plan.n_shards} shards in its journals, got {len(records)}"
        )
    require_complete(path, manifest, records)
    return records


def _why_not_complete(path: Path) -> str:
    plan = read_plan(path)
    if plan is None:
        return f"{path} must be a cache, got a directory without manifest.json and plan.json"
    return (
        f"{path} must be finished, got {len(newest(journals_at(path)))} of {plan.n_shards} shards; "
        "run the same `sae cache` command again, it goes on from there"
    )
