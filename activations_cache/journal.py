"""The journal: one checksummed line for each shard whose files are on the disk.

Each writer appends to a file of its own, `journal.rank0.jsonl` and so on. A line that does not
match its checksum (torn by a crash, say) is no line: its shard counts as not written.
"""

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from activations_cache import io
from activations_cache.errors import CacheFormatError
from activations_cache.records import seal, unseal

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HookSums:
    """What a shard adds to a hook point's statistics."""

    n_rows: int
    """Rows of the splits explain and score; the shard's `shard_mean` is their mean."""
    sum_square_norm: float
    """Sum of their squared norms."""
    n_nonfinite: int
    """Rows kept out because of this hook point."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A shard that is completely on the disk."""

    shard: int
    """Its number."""
    attempt: int
    """1, or more where an earlier version was found damaged; the highest one counts."""
    valid_rows: int
    """Rows from the start of the shard that hold something."""
    n_quarantined: int
    """Rows that were kept out."""
    hooks: dict[str, HookSums]
    """By hook point."""
    files: dict[str, dict[str, Any]]
    """`bytes` and `crc32c` of each of its files, by path relative to the cache."""


def journal_name(rank: int) -> str:
    """Return the name of a writer's journal."""
    return f"journal.rank{rank}.jsonl"


def journals_at(path: Path) -> list[Path]:
    """Return the journals of all writers of the cache at `path`."""
    return sorted(path.glob("journal.rank*.jsonl"))


def newest(journals: Iterable[Path]) -> dict[int, ShardRecord]:
    """Return the newest record of each shard in the given journals, in order of the shards."""
    found: dict[int, ShardRecord] = {}
    for journal in journals:
        for record in _records(journal)[0]:
            if record.shard not in found or found[record.shard].attempt < record.attempt:
                found[record.shard] = record
    return dict(sorted(found.items()))


def open_journal(path: Path) -> None:
    """Make a journal ready for appending: create it, or drop a line that a crash left torn."""
    io.cut(path, _records(path)[1] if path.exists() else 0)


def append_record(path: Path, record: ShardRecord) -> None:
    """Commit a shard: when this returns, its line is on the disk."""
    io.append(path, seal(asdict(record)))


def _records(path: Path) -> tuple[list[ShardRecord], int]:
    """Return the records of a journal and the size up to the end of the last one."""
    records, position, end = [], 0, 0
    *lines, _torn = path.read_bytes().split(b"\n")
    for line in lines:
        position += len(line) + 1
        try:
            records.append(_record(unseal(line + b"\n", str(path))))
            end = position
        except CacheFormatError as error:
            _log.warning("a line is not used: %s", error)
    return records, end


def _record(entries: dict[str, Any]) -> ShardRecord:
    try:
        hooks = {name: HookSums(**sums) for name, sums in entries["hooks"].items()}
        return ShardRecord(**{**entries, "hooks": hooks})
    except (KeyError, TypeError, AttributeError) as error:
        raise CacheFormatError(f"a journal must follow FORMAT.md, got {error!r}") from error
