"""Checking a whole cache: every byte against its checksum, every row against its example."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from activations_cache import io
from activations_cache.arrays import ShardedArray
from activations_cache.checks import CacheFormatError, Progress, silent
from activations_cache.journal import ShardRecord
from activations_cache.layout import IMAGE_TABLE, UNUSED, Layout, layout_of
from activations_cache.manifest import MANIFEST, PLAN, Manifest, read_manifest, read_plan


def verify(
    path: Path,
    manifest: Manifest,
    records: Mapping[int, ShardRecord],
    progress: Progress | None = None,
) -> list[str]:
    """Return what is wrong with the files of a cache, one line for each problem.

    Args:
        path: The cache.
        manifest: Its manifest.
        records: The journal's record of each shard.
        progress: Called for each shard.
    """
    progress = progress or silent
    problems = [*_records_problems(path, manifest)]
    for done, record in enumerate(records.values()):
        progress(done, len(records), "shards verified")
        problems += [f"shard {record.shard}: {found}" for found in _shard(path, manifest, record)]
    progress(len(records), len(records), "shards verified")
    return problems


def _records_problems(path: Path, manifest: Manifest) -> Iterator[str]:
    for name, read in ((MANIFEST, read_manifest), (PLAN, read_plan)):
        try:
            if read(path) is None:
                yield f"{path / name} must exist, got no such file"
        except CacheFormatError as error:
            yield str(error)
    if found := _table_problem(path, manifest):
        yield found
    for name, expected in {**manifest.journals, **manifest.files}.items():
        if found := io.problem(path / name, expected):
            yield found


def _table_problem(path: Path, manifest: Manifest) -> str | None:
    """Compare the table of images, if there must be one, with its hash in the identity."""
    expected = manifest.plan.made_from.get("images", {}).get("table_sha256")
    file = path / IMAGE_TABLE
    if expected is None:
        return None
    if not file.is_file():
        return f"{file} must exist, got no such file"
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    return None if found == expected else f"{file} must have sha256 {expected}, got {found}"


def _shard(path: Path, manifest: Manifest, record: ShardRecord) -> list[str]:
    layout = layout_of(manifest.plan)
    listed, wanted = set(record.files), {a.file(record.shard) for a in layout.per_shard()}
    problems = [f"{name} must be in the journal, got no entry" for name in sorted(wanted - listed)]
    found = (io.problem(path / name, expected) for name, expected in record.files.items())
    problems += [text for text in found if text is not None]
    return problems or [*_inconsistencies(path, layout, manifest, record)]


def _inconsistencies(
    path: Path, layout: Layout, manifest: Manifest, record: ShardRecord
) -> Iterator[str]:
    """Compare the rows of a shard whose files are right with its examples and the journal."""
    plan, records = manifest.plan, {record.shard: record}
    arrays = {n: ShardedArray(path, spec, records) for n, spec in layout.rows.items()}
    example, position, token = (
        arrays[n].valid(record.shard) for n in ("example", "position", "token")
    )
    covered, used = plan.examples_of(record.shard), arrays["example"].shard(record.shard) != UNUSED
    tokens = ShardedArray(path, layout.examples["tokens"], records).shard(record.shard)
    if int(used.sum()) != record.valid_rows or not used[: record.valid_rows].all():
        yield f"valid_rows must be {int(used.sum())}, the rows in use, got {record.valid_rows}"
        return
    inside = (example >= covered.start) & (example < covered.stop)
    inside &= (position >= plan.skip_positions) & (position < plan.context)
    if not inside.all():
        at = int(np.flatnonzero(~inside)[0])
        yield f"row {at} must come from the shard's examples, got {example[at]}, {position[at]}"
        return
    if (np.diff(example.astype(np.int64) * plan.context + position) <= 0).any():
        yield "rows must ascend by example and position, got rows out of order"
    if (tokens[example - covered.start, position] != token).any():
        yield "rows/token must be the tokens of the examples, got others"
