"""Files mapped one behind the other, so that the rows of many files are one array."""

import ctypes
import math
import mmap
import os
from functools import cache
from typing import IO

import numpy as np
from jaxtyping import Shaped

_MAP_FIXED = 0x10
"""Replace what is mapped there; Python does not name it. Linux, macOS and the BSDs agree."""


class AddressSpace:
    """Room in the address space for files of equal size; it costs no memory by itself.

    A file begins at a page and at a whole number of rows, so slot i begins at row i * stride.

    Args:
        n_slots: Files there can be.
        chunk: Shape of the array in each file; the first number is that of its rows.
        dtype: Its number format.

    Raises:
        MemoryError: If the process may not have so much address space.
    """

    def __init__(self, n_slots: int, chunk: tuple[int, ...], dtype: np.dtype) -> None:
        row_bytes = math.prod(chunk[1:]) * dtype.itemsize
        step = math.lcm(mmap.ALLOCATIONGRANULARITY, row_bytes) // row_bytes
        self.stride = -(-chunk[0] // step) * step
        self._chunk, self._slot_bytes = chunk, self.stride * row_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        size = n_slots * self._slot_bytes
        try:
            # Readable: an untouched page of it reads as zeros instead of ending the process.
            reserved = mmap.mmap(-1, size, flags=flags, prot=mmap.PROT_READ)
        except OSError as error:
            raise MemoryError(
                f"address space of {size:,} bytes must be free to map {n_slots} shards, got "
                f"{error}; raise the limit (ulimit -v)"
            ) from error
        flat = np.frombuffer(reserved, dtype)
        self._start = flat.ctypes.data
        self.rows: Shaped[np.ndarray, "row ..."] = flat.reshape(-1, *chunk[1:])

    def map(self, slot: int, file: IO[bytes]) -> None:
        """Put a file, which holds a whole chunk, into a slot, read only."""
        address = self._start + slot * self._slot_bytes
        n_bytes = os.fstat(file.fileno()).st_size
        flags = mmap.MAP_SHARED | _MAP_FIXED
        found = _mmap()(address, n_bytes, mmap.PROT_READ, flags, file.fileno(), 0)
        if found != address:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), file.name)

    def slot(self, slot: int) -> Shaped[np.ndarray, "row ..."]:
        """Return the array of the file in a slot."""
        first = slot * self.stride
        return self.rows[first : first + self._chunk[0]]


@cache
def _mmap() -> "ctypes._NamedFuncPointer":
    """Return the C library's mmap, which can say where; Python's cannot."""
    function = ctypes.CDLL(None, use_errno=True).mmap
    number, pointer = ctypes.c_int, ctypes.c_void_p
    function.argtypes = [pointer, ctypes.c_size_t, number, number, number, ctypes.c_longlong]
    function.restype = pointer
    return function
