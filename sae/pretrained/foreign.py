"""Files of other libraries, read safely: keys of a config, arrays of an npz, pickled weights.

Each key is read with its type. An npz may hold no pickles, and nothing that expands far beyond the
file's size. Pickled weights (.pt) are read by a closed process that can do nothing but read them.
"""

import math
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from monosema.checks import DictionaryFormatError, printable
from sae.pretrained import pickled_child


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks, cut to 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def needs_name(is_named: bool, format: str) -> None:
    """Refuse a top-k without ReLU unless the user named the format, and so accepts ours.

    Raises:
        DictionaryFormatError: If the format was not named.
    """
    if not is_named:
        raise DictionaryFormatError(
            "a top-k must cut negative values at 0, got one that keeps them among its k; they are "
            f"the same while k values are positive: name the format by format={format!r} to read "
            "it so"
        )


MOST = 1 << 28
"""No width of a dictionary is larger; products of two still fit into 64 bits."""
MAX = 1e30
"""Numbers beyond it have no place in fp32 weights."""
_REQUIRED = object()


class Fields:
    """A JSON object whose values are taken one by one; messages name the file and the key."""

    def __init__(self, record: Mapping[str, object], what: str) -> None:
        """Take the object and the name of what it is part of."""
        self.record, self.what = record, what

    def __contains__(self, key: str) -> bool:
        return self.record.get(key) is not None

    def only(self, known: Iterable[str]) -> None:
        """Refuse keys that are not known: one of them may change what the numbers mean."""
        if unknown := sorted(set(self.record) - set(known)):
            raise DictionaryFormatError(
                f"{self.what} must have known keys, got {unknown}; update monosema, or remove "
                "them if they do not change how the dictionary is applied"
            )

    def whole(self, key: str, default: object = _REQUIRED, least: int = 1) -> int:
        """A whole number."""
        value = self._value(key, default)
        if type(value) is not int or not least <= value <= MOST:
            self._refuse(key, f"be a whole number from {least} to {MOST:,}", value)
        assert isinstance(value, int)
        return value

    def number(self, key: str, default: object = _REQUIRED) -> float:
        """A number of moderate size."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not -MAX < value < MAX:
            self._refuse(key, f"be a number within {MAX:g}", value)
        assert isinstance(value, int | float)
        return float(value)

    def flag(self, key: str, default: object = _REQUIRED) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            self._refuse(key, "be true or false", value)
        return bool(value)

    def word(self, key: str, words: Iterable[str] = (), default: object = _REQUIRED) -> str:
        """A text, one of `words` if there are any."""
        value, words = self._value(key, default), tuple(words)
        if not isinstance(value, str) or (words and value not in words):
            self._refuse(key, f"be one of {list(words)}" if words else "be a text", value)
        return str(value)

    def part(self, key: str, default: object = _REQUIRED) -> "Fields":
        """An object inside this one."""
        value = self._value(key, default)
        if not isinstance(value, dict):
            self._refuse(key, "be an object", value)
        assert isinstance(value, dict)
        return Fields(value, f"{self.what}, {key}")

    def parts(self, key: str) -> list["Fields"]:
        """The objects in a list inside this one; none where it is absent."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            self._refuse(key, "be a list of objects", value)
        assert isinstance(value, list)
        return [Fields(entry, f"{self.what}, {key}") for entry in value]

    def texts(self, keys: Iterable[str]) -> dict[str, str]:
        """Those of the keys that are there, as text: notes for a reader."""
        return {key: printable(str(self.record[key]), 200) for key in keys if key in self}

    def _value(self, key: str, default: object) -> object:
        value = self.record.get(key)
        if value is None:
            value = default
        if value is _REQUIRED:
            raise DictionaryFormatError(f"{self.what} must have the key {key!r}, got none")
        return value

    def _refuse(self, key: str, rule: str, value: object) -> None:
        raise DictionaryFormatError(f"{key} must {rule} in {self.what}, got {value!r}")


MAX_ARRAYS = 64
MAX_EXPANSION = 4
FREE_BYTES = 16 << 20
"""A vector of ones compresses to almost nothing; so much may come from a small file."""
DTYPES = ("<f2", "<f4", "<f8", "<i4", "<i8")
MAGIC = b"\x93NUMPY\x01\x00"
# Numpy's own parser takes any literal of Python, and fails on damaged ones in many ways.
HEADER = re.compile(
    rb"\{'descr': '([^']{1,9})', 'fortran_order': (True|False), 'shape': (\([\d, ]{0,99}\)), \}\s*"
)
NUMBER = re.compile(rb"\d+")


def read_npz(path: Path) -> dict[str, Tensor]:
    """Read all arrays of an npz file as they are stored.

    Raises:
        DictionaryFormatError: If it is damaged, holds pickled objects, or would expand to more
            than four times its size and 16 MiB.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _checked(archive, path)
            return {
                member.filename.removesuffix(".npy"): _array(archive, member, path)
                for member in members
            }
    # zipfile raises NotImplementedError for a compression that it does not know.
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise DictionaryFormatError(
            f"{path} must be a whole npz file, got: {one_line(error)}; copy it again"
        ) from error


def _checked(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(names) > MAX_ARRAYS or len(set(names)) != len(names):
        raise DictionaryFormatError(
            f"{path} must hold at most {MAX_ARRAYS} arrays of different names, got {len(names):,}"
        )
    odd = [name for name in names if not name.endswith(".npy") or "/" in name or "\\" in name]
    if odd:
        raise DictionaryFormatError(f"{path} must hold arrays NAME.npy alone, got {odd[0]!r}")
    total = sum(member.file_size for member in members)
    most = MAX_EXPANSION * path.stat().st_size + FREE_BYTES
    if total > most:
        raise DictionaryFormatError(
            f"{path} must expand to at most {most:,} bytes, got {total:,}; it is not a dictionary"
        )
    return members


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Tensor:
    what = f"{path}, array {member.filename}"
    with archive.open(member) as stream:
        start = stream.read(len(MAGIC) + 2)
        result = HEADER.fullmatch(stream.read(int.from_bytes(start[-2:], "little")))
        if not start.startswith(MAGIC) or result is None:
            raise DictionaryFormatError(f"{what} must have a plain npy header, got another")
        if (descr := result[1].decode()) not in DTYPES:
            raise DictionaryFormatError(
                f"{what} must hold numbers, got {descr!r}; pickled objects are never read"
            )
        shape = tuple(int(length) for length in NUMBER.findall(result[3]))
        size = math.prod(shape) * np.dtype(descr).itemsize
        data = stream.read(size) if size <= member.file_size else b""
        if len(data) != size or stream.read(1):
            raise DictionaryFormatError(f"{what} must hold {shape} numbers, got another size")
    array = np.frombuffer(data, descr).reshape(shape, order="F" if result[2] == b"True" else "C")
    return torch.from_numpy(array.copy())


SECONDS = 120
SECONDS_PER_GIB = 60


class Content(NamedTuple):
    """What a .pt file holds; names of nested dicts are joined by dots."""

    tensors: dict[str, Tensor]
    """Tensors as stored."""
    values: dict[str, object]
    """Numbers, texts and None; of anything else the name of its type, in angle brackets."""


def read(path: Path, start: int = 0) -> Content:
    """Read a .pt file, or what follows its first `start` bytes, in a confined process.

    The kernel refuses the process all but reading the file and writing its answer, a safetensors
    file; its environment is empty; memory, time and the answer's size are bounded.

    Raises:
        DictionaryFormatError: If the file holds more than tensors and plain values, or is damaged.
    """
    size = path.stat().st_size
    with tempfile.TemporaryDirectory(prefix="monosema-") as folder:
        target = Path(folder) / "weights.safetensors"
        error = convert(path, target, SECONDS + SECONDS_PER_GIB * size / 2**30, start)
        if error:
            raise DictionaryFormatError(
                f"{path} must hold tensors and plain values alone, got: {error}"
            )
        with safe_open(target, framework="pt") as opened:
            values = pickled_child.unpacked(opened.metadata())
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    return Content(tensors, values)


def convert(path: Path, target: Path, seconds: float, start: int = 0) -> str | None:
    """Run the confined process; return what went wrong in one line, or None."""
    command = [sys.executable, "-P", pickled_child.__file__, str(path), str(target), str(start)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds,
            check=False, cwd=target.parent, env={},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no end within {seconds:.0f} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return one_line(ValueError(lines[-1] if lines else f"exit code {done.returncode}"))
