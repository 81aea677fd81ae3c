"""Building a cache: a model reads text or images, and what passes its hook points is stored."""

import json
import math
import os
from pathlib import Path

import numpy as np

from activations_cache import io
from activations_cache.config import CacheConfig, parse_hook_point
from activations_cache.errors import CacheFormatError
from activations_cache.image_rows import ImageRows
from activations_cache.journal import journals_at, newest
from activations_cache.manifest import Plan, read_manifest, read_plan
from activations_cache.progress import Progress, silent
from activations_cache.reader import ActivationCache, open_cache
from activations_cache.records import first_difference
from activations_cache.shard import ShardBuffer
from activations_cache.source import (
    RowSource,
    forward_ranges,
    load_on_device,
    load_source,
    request_of,
    widths,
)
from activations_cache.storage import STORAGE
from activations_cache.writer import CacheWriter

_RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


def build(
    config: CacheConfig, path: str | Path, *, progress: Progress | None = None
) -> ActivationCache:
    """Build the cache that a configuration describes, or go on building it, or just open it.

    Several processes may build one cache: under torchrun or SLURM each takes its share of the
    shards, and the last one finishes. A complete cache of the same configuration is opened without
    loading the model.

    Args:
        config: Model, text or images, hook points and sizes.
        path: The cache's directory: new, empty, or begun by the same configuration.
        progress: Called with rows done and rows in all after every forward.

    Raises:
        CacheBusyError: If another live process builds here under the same rank.
        CacheFormatError: If the directory holds something else; the message names the key.
        DiskFullError: If the cache will not fit, or the disk becomes full.
        NonFiniteError: If too many rows are not finite.
    """
    path, progress = Path(path), progress or silent
    if _is_complete(path, config):
        return open_cache(path)
    _require_space(config, path, _width_by_config(config))
    loaded = load_on_device(config, progress)
    _require_space(config, path, sum(widths(config, loaded).values()))
    source = load_source(config, loaded, progress)
    rank, n_ranks = rank_of_this_process()
    with CacheWriter(path, source.plan, rank=rank, progress=progress) as writer:
        write_shards(writer, source, config.contexts_per_forward, n_ranks, progress)
        if isinstance(source, ImageRows):
            source.write_table(path)
        writer.finish(source.provenance)
    return open_cache(path)


def write_shards(
    writer: CacheWriter,
    source: RowSource,
    contexts_per_forward: int,
    n_ranks: int,
    progress: Progress,
) -> None:
    """Write shards until none is missing."""
    plan = source.plan
    total = plan.n_examples * plan.rows_per_example
    for shard in writer.claims(n_ranks):
        before = sum(r.valid_rows + r.n_quarantined for r in writer.committed().values())
        buffer = ShardBuffer(plan, shard, source.examples)
        for numbers in forward_ranges(plan.examples_of(shard), contexts_per_forward):
            buffer.add(numbers, source(numbers))
            progress(before + buffer.n_rows + len(buffer.quarantined), total, "rows")
        writer.commit(buffer)


def rank_of_this_process() -> tuple[int, int]:
    """Return the rank and the number of ranks that torchrun or SLURM set, or (0, 1).

    Raises:
        ValueError: If the variables do not fit together.
    """
    for rank_name, n_ranks_name in _RANKS:
        if n_ranks_name in os.environ:
            rank, n_ranks = int(os.environ.get(rank_name, "0")), int(os.environ[n_ranks_name])
            if not 0 <= rank < n_ranks:
                raise ValueError(f"{rank_name} must be below {n_ranks_name}={n_ranks}, got {rank}")
            return rank, n_ranks
    return 0, 1


def _is_complete(path: Path, config: CacheConfig) -> bool:
    """Say whether this cache is there already; refuse a directory of another request."""
    there = _plan_at(path)
    if there is None:
        return False
    difference = first_difference(request_of(config), there.request)
    if difference is not None:
        raise CacheFormatError(
            f"{path} must be built from this configuration, got another {difference}; "
            "choose another directory or remove this one"
        )
    if read_manifest(path) is None:
        return False
    records = newest(journals_at(path)).values()
    sizes = ((n, {"bytes": f["bytes"]}) for r in records for n, f in r.files.items())
    return all(io.problem(path / name, size) is None for name, size in sizes)


def _plan_at(path: Path) -> Plan | None:
    manifest = read_manifest(path)
    return manifest.plan if manifest is not None else read_plan(path)


def _require_space(config: CacheConfig, path: Path, width: int) -> None:
    """Refuse what cannot fit, by a lower bound of its size, before the slow part."""
    if config.compression != "none":  # nobody knows how far it will go
        return
    if _plan_at(path) is not None:  # part of it is there; the writer counts what is missing
        return
    n_rows = math.ceil(config.n_rows / (1 - config.data.hold))
    io.require_space(path, n_rows * width * np.dtype(STORAGE[config.dtype][1]).itemsize)


def _width_by_config(config: CacheConfig) -> int:
    """Return the sum of the hook points' widths as far as a local config.json tells them.

    It tells that of whole blocks, whose module paths end in a number.
    """
    file = Path(config.model.path) / "config.json"
    if not file.is_file():
        return 0
    try:
        entries = json.loads(file.read_bytes())
        part = "text_config" if config.images is None else "vision_config"
        d_model = int(entries.get(part, entries)["hidden_size"])
    except (AttributeError, KeyError, TypeError, ValueError):  # loading the model will tell
        return 0
    blocks = [p for p in config.hook_points if parse_hook_point(p)[0].split(".")[-1].isdigit()]
    return d_model * len(blocks)
