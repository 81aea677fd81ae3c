"""The end of a cache: statistics merged in the order of the shards, metadata, manifest."""

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from activations_cache import io
from activations_cache.arrays import ShardedArray
from activations_cache.config import SPLITS, TRAINING_SPLITS
from activations_cache.journal import ShardRecord, journals_at, newest
from activations_cache.layout import Layout, layout_of
from activations_cache.manifest import HookStatistics, Manifest, Plan, write_manifest

QUANTILES = (0, 0.01, 0.05, 0.5, 0.95, 0.99, 1)
"""At which quantiles the norm is recorded."""

_PACKAGES = ("monosema", "torch", "transformers", "numpy")


def finish(path: Path, plan: Plan, provenance: Mapping[str, object]) -> None:
    """Write what belongs to the whole cache; every shard is in a journal.

    The arrays get their `zarr.json` only here, so that an unfinished cache cannot be read as if its
    missing shards were zeros.

    Args:
        path: The cache.
        plan: What it was made from.
        provenance: What the caller records; versions, threads and the date are added.
    """
    journals = journals_at(path)
    records, layout = newest(journals), layout_of(plan)
    files: dict[str, io.Buffer] = {**layout.metadata()}
    for name, arrays in layout.hooks.items():
        shard_means = ShardedArray(path, arrays.shard_mean, records)
        files[arrays.mean.file(0)] = _mean(shard_means, records, name)
    io.write_files({path / name: data for name, data in files.items()})
    manifest = Manifest(
        plan=plan,
        n_rows=sum(record.valid_rows for record in records.values()),
        n_quarantined=sum(record.n_quarantined for record in records.values()),
        statistics=_statistics(path, layout, records),
        journals={journal.name: io.describe(journal.read_bytes()) for journal in journals},
        files={name: io.describe(data) for name, data in sorted(files.items())},
        provenance={**provenance, **_here()},
    )
    write_manifest(path, manifest)


def _mean(
    shard_means: ShardedArray, records: Mapping[int, ShardRecord], hook_point: str
) -> np.ndarray:
    """Merge the shards' means, each with its number of rows, in float64."""
    total, mean = 0, 0.0
    for shard, record in records.items():
        n_rows = record.hooks[hook_point].n_rows
        total += n_rows
        mean += (shard_means.shard(shard)[0] - mean) * (n_rows / max(total, 1))
    return np.asarray(mean)


def _statistics(
    path: Path, layout: Layout, records: Mapping[int, ShardRecord]
) -> dict[str, HookStatistics]:
    example = ShardedArray(path, layout.rows["example"], records)
    split = ShardedArray(path, layout.examples["split"], records)
    training = [SPLITS.index(name) for name in TRAINING_SPLITS]
    wanted = {}
    for shard in records:
        rows = example.valid(shard) - shard * layout.examples["split"].chunk[0]
        wanted[shard] = np.isin(split.shard(shard)[rows], training)
    return {
        name: _statistics_of(ShardedArray(path, arrays.norm, records), records, name, wanted)
        for name, arrays in layout.hooks.items()
    }


def _statistics_of(
    norm: ShardedArray,
    records: Mapping[int, ShardRecord],
    hook_point: str,
    wanted: Mapping[int, np.ndarray],
) -> HookStatistics:
    sums = [record.hooks[hook_point] for record in records.values()]
    n_rows = sum(shard.n_rows for shard in sums)
    norms = np.concatenate([norm.valid(shard)[wanted[shard]] for shard in records])
    values = np.quantile(norms, QUANTILES).tolist() if n_rows else [0.0] * len(QUANTILES)
    return HookStatistics(
        n_rows=n_rows,
        mean_square_norm=sum(shard.sum_square_norm for shard in sums) / max(n_rows, 1),
        norm_quantiles={str(q): value for q, value in zip(QUANTILES, values, strict=True)},
        n_nonfinite=sum(shard.n_nonfinite for shard in sums),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "a source checkout"


def _here() -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
