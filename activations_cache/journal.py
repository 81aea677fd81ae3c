"""The journal: one checksummed line for each shard whose files are on the disk.

Each writer appends to a file of its own, `journal.rank0.jsonl` and so on. A line that does not
match its checksum (torn by a crash, say) is no line: its shard counts as not written.

JSON records that carry their own checksum: `{"crc32c": "1a2b3c4d", "record": {...}}`.

The checksum is over the bytes of the record exactly as they stand in the file, so it can be checked
without agreeing on a canonical form. The manifest, the plan and each line of a journal are such
records.
"""

import functools
import hashlib
import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from activations_cache import io
from activations_cache.checks import CacheFormatError
from monosema.checks import MOST

_PREFIX = b'{"crc32c": "%s", "record": '
_PREFIX_LENGTH = len(_PREFIX % b"00000000")
_SUFFIX = b"}\n"


def seal(record: dict[str, Any], *, indent: int | None = None) -> bytes:
    """Return a record as JSON with its checksum, ending in one newline.

    Raises:
        ValueError: If the record holds a number that is not finite.
    """
    body = json.dumps(record, indent=indent, allow_nan=False).encode()
    return _PREFIX % io.crc32c(body).encode() + body + _SUFFIX


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """Return the record in `data`.

    Raises:
        CacheFormatError: If the bytes are not what `seal` wrote; `name` says whose they are.
    """
    body = data[_PREFIX_LENGTH : -len(_SUFFIX)]
    if data != _PREFIX % io.crc32c(body).encode() + body + _SUFFIX:
        raise CacheFormatError(f"{name} must match its own checksum, got a damaged file")
    record = json.loads(body)
    if not isinstance(record, dict):
        raise CacheFormatError(f"{name} must hold a JSON object, got {type(record).__name__}")
    return record


def fingerprint(identity: dict[str, Any]) -> str:
    """Return the SHA-256 of the canonical JSON of an identity: sorted keys, no spaces, ASCII."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def first_difference(
    expected: dict[str, Any], actual: dict[str, Any], *, subset: bool = False, path: str = ""
) -> str | None:
    """Name the first key in which two JSON objects differ, with both values.

    Lists and tuples are the same thing. With `subset`, keys that only `actual` has are not looked
    at.

    Returns:
        `"dotted.key: expected 1, got 2"`, or None where there is no difference.
    """
    keys = list(expected) if subset else list(dict.fromkeys((*expected, *actual)))
    for key in keys:
        one, other = expected.get(key, _ABSENT), actual.get(key, _ABSENT)
        if isinstance(one, dict) and isinstance(other, dict):
            inner = first_difference(one, other, subset=subset, path=f"{path}{key}.")
            if inner is not None:
                return inner
        elif _plain(one) != _plain(other):
            return f"{path}{key}: expected {_plain(one)!r}, got {_plain(other)!r}"
    return None


Files = dict[str, dict[str, int | str]]
"""`bytes` and `crc32c` of files, by path inside a directory."""

_hints = functools.cache(get_type_hints)


def require_types(record: object, name: str) -> None:
    """Refuse a record of a file whose entries are of other kinds than its class says.

    Raises:
        CacheFormatError: Naming the entry.
    """
    for key, hint in _hints(type(record)).items():
        value = getattr(record, key)
        if not (_are_files(value) if hint == Files else _fits(value, hint)):
            raise CacheFormatError(f"{name} must follow FORMAT.md, got {key}={repr(value)[:60]}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether plain data are what a hint says; whole numbers are counts, from 0 on."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any or is_dataclass(hint):  # a record inside was looked at when it was made
        return True
    if origin is UnionType:
        return any(_fits(value, each) for each in inner)
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_fits(key, inner[0]) and _fits(each, inner[1]) for key, each in pairs)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(each, inner[0]) for each in value)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is hint and (hint is not int or 0 <= value <= MOST)


def _are_files(value: object) -> bool:
    """Whether these are files inside a directory, with their sizes and checksums."""
    if not _fits(value, Files):
        return False
    assert isinstance(value, dict)
    return all(
        type(entry.get("bytes")) is int
        and type(entry.get("crc32c", "")) is str
        and path.isascii()
        and path.isprintable()
        and not {"", ".."} & {*path.split("/")}  # neither absolute nor out of the directory
        for path, entry in value.items()
    )


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Absent()


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


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
    files: Files
    """`bytes` and `crc32c` of each of its files, by path relative to the cache."""


def journal_name(rank: int) -> str:
    """Return the name of a writer's journal."""
    return f"journal.rank{rank}.jsonl"


def journals_at(path: Path) -> list[Path]:
    """Return the journals of all writers of the cache at `path`."""
    return sorted(path.glob("journal.rank*.jsonl"))


def newest(journals: Iterable[Path]) -> dict[int, ShardRecord]:
    """Return the newest record of each shard in the given journals, in order of the shards."""
    results: dict[int, ShardRecord] = {}
    for journal in journals:
        for record in _records(journal)[0]:
            if record.shard not in results or results[record.shard].attempt < record.attempt:
                results[record.shard] = record
    return dict(sorted(results.items()))


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
        record = ShardRecord(**{**entries, "hooks": hooks})
    except (KeyError, TypeError, AttributeError) as error:
        raise CacheFormatError(f"a journal must follow FORMAT.md, got {error!r}") from error
    for part in (record, *hooks.values()):
        require_types(part, "a journal")
    return record
