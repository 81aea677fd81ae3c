"""JSON records that carry their own checksum: `{"crc32c": "1a2b3c4d", "record": {...}}`.

The checksum is over the bytes of the record exactly as they stand in the file, so it can be checked
without agreeing on a canonical form. The manifest, the plan and each line of a journal are such
records.
"""

import hashlib
import json
from typing import Any

from activations_cache import io
from activations_cache.errors import CacheFormatError

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


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Absent()


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
