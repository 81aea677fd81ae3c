"""A data file of the browser: one statement of JavaScript that hands a JSON text over.

Pages opened from a disk may load scripts and nothing else, so the data are scripts. The JSON stands
in a string: it is parsed as JSON, in which no key has a meaning, and faster than a program.
"""

import binascii
import json
import re
import sys
from array import array
from collections.abc import Iterable

# Characters that end a string or a script element, turn the direction of the text around them, or
# cannot be written as UTF-8. In JSON they stand in strings only, so each may be escaped.
_UNSAFE = re.compile(
    "['<>&\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def script(key: str, value: object) -> str:
    """The text of the file `data/KEY.js`."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text).replace("\\", "\\\\")
    return f"MONOSEMA.put({json.dumps(key)},'{text}')\n"


def short(value: float | None) -> float | None:
    """Five digits: more than the browser shows."""
    return None if value is None else float(f"{value:.5g}")


def f32(values: Iterable[float | int]) -> str:
    """Base64 of 32-bit floats, little-endian."""
    return _base64(array("f", values))


def i32(values: Iterable[int]) -> str:
    """Base64 of 32-bit integers, little-endian."""
    return _base64(array("i", values))


def u8(values: Iterable[int]) -> str:
    """Base64 of bytes."""
    return _base64(array("B", values))


def _base64(numbers: array) -> str:
    if sys.byteorder == "big":
        numbers.byteswap()
    return binascii.b2a_base64(numbers.tobytes(), newline=False).decode("ascii")
