"""Results that are read back: written durably, listed with their checksums, compared when read.

Each directory of results has a `files.json`: its files with sizes and CRC-32C, in a record that
carries its own checksum as the cache's manifest does. A file that is listed must be as it was
written. A file that no list names (one of an older version, or of a person) is taken as it is.
`verify` checks a whole cache: every byte against its checksum, every row against its example.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from activations_cache import io
from activations_cache.arrays import ShardedArray
from activations_cache.checks import CacheFormatError, DamagedFileError, Progress, silent
from activations_cache.journal import ShardRecord, seal, unseal
from activations_cache.layout import IMAGE_TABLE, UNUSED, Layout, layout_of
from activations_cache.manifest import MANIFEST, PLAN, Manifest, read_manifest, read_plan

_SETTLED_NS = 3 * 10**9
"""Clocks of file systems step in up to 2 s; a younger file is read again each time."""

LIST = "files.json"
"""Name of the list in each directory of results."""


def write(directory: Path, files: Mapping[str, io.Buffer]) -> None:
    """Put files of a directory in place durably, and list them.

    Args:
        directory: Made if it is missing.
        files: Contents by path inside the directory; they appear in this order.

    Raises:
        DiskFullError: If the file system or a quota is exhausted.
    """
    with _changing(directory, files):
        io.write_files({directory / name: data for name, data in files.items()})


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a temporary, and put it in the place of a file when the block is left.

    For what is written piece by piece. The file is on the disk and listed after the block; it is as
    it was before if the block fails.
    """
    io.make_directory(path.parent)
    temporary = io.temporary(path)
    try:
        with io.naming_path(path):
            yield temporary
        io.sync_file(temporary)
        with _changing(path.parent, (path.name,)):
            io.rename(temporary, path)
            io.sync_directory(path.parent)
    finally:
        io.unlink(temporary)


def add(directory: Path, names: Iterable[str]) -> None:
    """List files that were written by others; they are brought to the disk first."""
    names = tuple(names)
    for name in names:
        io.sync_file(directory / name)
    with _changing(directory, names):
        pass


def remove(directory: Path, names: Iterable[str]) -> None:
    """Remove files, and take them from the list."""
    names = tuple(names)
    _unlist(directory, names)
    for name in names:
        io.unlink(directory / name)


def require_whole(path: Path, root: Path | None = None, *, advice: str = "copy it again") -> Path:
    """Return the path of a file that is as it was written.

    Args:
        path: The file.
        root: Directory whose list names it; its own directory when absent.
        advice: What mends it.

    Raises:
        DamagedFileError: If its list names it, and it is not what the list says; or the list itself
            is damaged.
    """
    root = root or path.parent
    expected = listed(root).get(path.relative_to(root).as_posix())
    if expected is None:
        return path
    try:
        now = path.stat()
    except FileNotFoundError:
        raise DamagedFileError(f"{path} must exist, got no such file; {advice}") from None
    compare = _difference if _is_settled(now) else _difference.__wrapped__
    difference = compare(path, expected["bytes"], expected["crc32c"], _stamp(now))
    if difference is not None:
        raise DamagedFileError(f"{difference}; it is damaged: {advice}")
    return path


def read(path: Path, root: Path | None = None, *, advice: str = "copy it again") -> bytes:
    """Return the contents of a file that is as it was written."""
    return require_whole(path, root, advice=advice).read_bytes()


def listed(directory: Path) -> dict[str, dict[str, Any]]:
    """Return sizes and checksums of the files that a directory's list names; empty without one.

    Raises:
        DamagedFileError: If the list is damaged.
    """
    path = directory / LIST
    if not path.is_file():
        return {}
    try:
        return unseal(path.read_bytes(), str(path))
    except CacheFormatError as error:
        raise DamagedFileError(
            f"{error}; copy the directory again, or remove the list to go on unchecked"
        ) from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file; it is read once for each state of the file."""
    now = path.stat()
    digest = _sha256 if _is_settled(now) else _sha256.__wrapped__
    return digest(path, _stamp(now))


def _stamp(now: os.stat_result) -> tuple[int, int, int]:
    return now.st_size, now.st_mtime_ns, now.st_ino


def _is_settled(now: os.stat_result) -> bool:
    """Whether a file was last written so long ago that a change would show in its time."""
    return time.time_ns() - now.st_mtime_ns > _SETTLED_NS


@lru_cache(maxsize=256)
def _sha256(path: Path, stamp: tuple[int, int, int]) -> str:
    del stamp
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@lru_cache(maxsize=4096)
def _difference(path: Path, size: int, crc32c: str, stamp: tuple[int, int, int]) -> str | None:
    """How a file differs from its list; read once for each state of the file."""
    del stamp
    return io.problem(path, {"bytes": size, "crc32c": crc32c})


def is_damaged(directory: Path) -> bool:
    """Whether a directory's list is not as it was written."""
    try:
        listed(directory)
    except DamagedFileError:
        return True
    return False


@contextlib.contextmanager
def _changing(directory: Path, names: Iterable[str]) -> Iterator[None]:
    """Files change inside: they are not listed meanwhile, so that a crash leaves no wrong list."""
    names = tuple(names)
    _unlist(directory, names)
    yield
    new = {name: io.describe(io.map_file(directory / name)) for name in names}
    _write_list(directory, _known(directory) | new)


def _unlist(directory: Path, names: tuple[str, ...]) -> None:
    known = _known(directory)
    if known.keys() & set(names):
        _write_list(directory, {n: entry for n, entry in known.items() if n not in names})


def _known(directory: Path) -> dict[str, dict[str, Any]]:
    """The list as far as it is whole; a damaged one is begun anew by what is written next."""
    return {} if is_damaged(directory) else listed(directory)


def _write_list(directory: Path, entries: dict[str, dict[str, Any]]) -> None:
    io.write_files({directory / LIST: seal(dict(sorted(entries.items())), indent=1)})


def describe_all(root: Path, files: Iterable[Path]) -> dict[str, dict[str, int | str]]:
    """Return sizes and checksums by path inside a directory, for a mark of what was done."""
    return {
        os.path.relpath(path, root): io.describe(io.map_file(path)) for path in sorted(set(files))
    }


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
        problems += [f"shard {record.shard}: {result}" for result in _shard(path, manifest, record)]
    progress(len(records), len(records), "shards verified")
    return problems


def _records_problems(path: Path, manifest: Manifest) -> Iterator[str]:
    for name, read in ((MANIFEST, read_manifest), (PLAN, read_plan)):
        try:
            if read(path) is None:
                yield f"{path / name} must exist, got no such file"
        except CacheFormatError as error:
            yield str(error)
    if result := _table_problem(path, manifest):
        yield result
    for name, expected in {**manifest.journals, **manifest.files}.items():
        if result := io.problem(path / name, expected):
            yield result


def _table_problem(path: Path, manifest: Manifest) -> str | None:
    """Compare the table of images, if there must be one, with its hash in the identity."""
    expected = manifest.plan.made_from.get("images", {}).get("table_sha256")
    file = path / IMAGE_TABLE
    if expected is None:
        return None
    if not file.is_file():
        return f"{file} must exist, got no such file"
    result = hashlib.sha256(file.read_bytes()).hexdigest()
    return None if result == expected else f"{file} must have sha256 {expected}, got {result}"


def _shard(path: Path, manifest: Manifest, record: ShardRecord) -> list[str]:
    layout = layout_of(manifest.plan)
    listed, wanted = set(record.files), {a.file(record.shard) for a in layout.per_shard()}
    problems = [f"{name} must be in the journal, got no entry" for name in sorted(wanted - listed)]
    result = (io.problem(path / name, expected) for name, expected in record.files.items())
    problems += [text for text in result if text is not None]
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
