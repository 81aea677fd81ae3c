"""Arrays of an npz file: no pickles, and nothing that expands far beyond the file's own size."""

import math
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae.pretrained.fields import DictionaryFormatError, one_line

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


def read(path: Path) -> dict[str, Tensor]:
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
        found = HEADER.fullmatch(stream.read(int.from_bytes(start[-2:], "little")))
        if not start.startswith(MAGIC) or found is None:
            raise DictionaryFormatError(f"{what} must have a plain npy header, got another")
        if (descr := found[1].decode()) not in DTYPES:
            raise DictionaryFormatError(
                f"{what} must hold numbers, got {descr!r}; pickled objects are never read"
            )
        shape = tuple(int(length) for length in NUMBER.findall(found[3]))
        size = math.prod(shape) * np.dtype(descr).itemsize
        data = stream.read(size) if size <= member.file_size else b""
        if len(data) != size or stream.read(1):
            raise DictionaryFormatError(f"{what} must hold {shape} numbers, got another size")
    array = np.frombuffer(data, descr).reshape(shape, order="F" if found[2] == b"True" else "C")
    return torch.from_numpy(array.copy())
