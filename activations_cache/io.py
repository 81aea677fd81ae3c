"""Every change that the cache makes to a disk goes through the few functions of this file.

The primitives at the top are called by the rest through this module's globals, so that a test can
replace any of them and stop a writer at its k-th call. Names: a *temporary* is `.NAME.tmp` beside
its target; whoever writes it holds the lock for that target, so a restart may simply overwrite it.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from activations_cache.checks import CacheBusyError, DiskFullError

Buffer = bytes | np.ndarray
"""What a file is written from; an array gives its bytes in C order."""


class Parts(NamedTuple):
    """A file that is made part by part while it is written, so that no memory holds all of it."""

    n_bytes: int
    """Of all of them."""
    parts: Iterable[Buffer]


_FULL = (errno.ENOSPC, errno.EDQUOT)


def open_file(path: Path, flags: int) -> int:
    """Open a file and return its descriptor."""
    return os.open(path, flags | os.O_CLOEXEC, 0o666)


def write(descriptor: int, data: memoryview) -> None:
    """Write all of the data."""
    while data:
        data = data[os.write(descriptor, data) :]


def fsync(descriptor: int) -> None:
    """Wait until a file or directory is on the disk."""
    os.fsync(descriptor)


def rename(source: Path, target: Path) -> None:
    """Put a file in the place of another, at once."""
    os.replace(source, target)


def mkdir(path: Path) -> None:
    """Create a directory whose parent exists."""
    path.mkdir(exist_ok=True)


def truncate(descriptor: int, size: int) -> None:
    """Cut a file to a size."""
    os.ftruncate(descriptor, size)


def unlink(path: Path) -> None:
    """Remove a file, which may be gone already."""
    path.unlink(missing_ok=True)


def crc32c(data: Buffer) -> str:
    """Return the CRC-32C of the bytes as eight lower-case hexadecimal digits."""
    # The C library takes arrays as they are; for a memory map that saves a copy of the file.
    return f"{google_crc32c.value(data):08x}"  # pyright: ignore[reportArgumentType]


def n_bytes(data: Buffer | Parts) -> int:
    """Return how many bytes a file written from this has."""
    if isinstance(data, Parts):
        return data.n_bytes
    return data.nbytes if isinstance(data, np.ndarray) else len(data)


def describe(data: Buffer) -> dict[str, int | str]:
    """Return the size and the checksum by which `problem` knows a file written from this."""
    return {"bytes": n_bytes(data), "crc32c": crc32c(data)}


def map_file(path: Path) -> np.ndarray:
    """Return a file's bytes as a read-only memory map."""
    if path.stat().st_size == 0:
        return np.empty(0, np.uint8)
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(view, np.uint8)


def problem(path: Path, expected: Mapping[str, int | str]) -> str | None:
    """Say how a file differs from what `describe` said of it, or None where it does not.

    Only the size is looked at where `expected` has no `crc32c`.
    """
    if not path.is_file():
        return f"{path} must exist, got no such file"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"{path} must have {expected['bytes']:,} bytes, got {size:,}"
    if "crc32c" in expected and (result := crc32c(map_file(path))) != expected["crc32c"]:
        return f"{path} must have crc32c {expected['crc32c']}, got {result}"
    return None


def write_files(files: Mapping[Path, Buffer | Parts]) -> None:
    """Put files in place durably: all are on the disk, under their names, when this returns.

    Each is written beside its target, synced and renamed; then the directories are synced. The
    caller holds the lock that covers the targets.

    Raises:
        DiskFullError: If the file system or a quota is exhausted; temporaries are removed.
    """
    for path in files:
        make_directory(path.parent)
    try:
        for path, data in files.items():
            with _reporting_full_disk(path, n_bytes(data)):
                _write_temporary(temporary(path), data)
    except DiskFullError:
        for path in files:
            unlink(temporary(path))
        raise
    for path in files:
        rename(temporary(path), path)
    for directory in dict.fromkeys(path.parent for path in files):
        sync_directory(directory)


def append(path: Path, line: bytes) -> None:
    """Append a line durably, or leave the file as it was.

    Raises:
        DiskFullError: If the file system or a quota is exhausted.
    """
    with _closing(open_file(path, os.O_WRONLY | os.O_APPEND)) as descriptor:
        size = os.fstat(descriptor).st_size
        try:
            with _reporting_full_disk(path, len(line)):
                write(descriptor, memoryview(line))
                fsync(descriptor)
        except OSError:
            truncate(descriptor, size)
            raise


def cut(path: Path, size: int) -> None:
    """Cut a file to a size, creating it if need be, durably."""
    created = not path.exists()
    with _closing(open_file(path, os.O_WRONLY | os.O_CREAT)) as descriptor:
        truncate(descriptor, size)
        fsync(descriptor)
    if created:
        sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Create a directory and its parents durably."""
    if not path.is_dir():
        make_directory(path.parent)
        with _reporting_full_disk(path, 0):
            mkdir(path)
        sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with _closing(open_file(path, os.O_RDONLY)) as descriptor:
        fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    with _closing(open_file(path, os.O_RDONLY | os.O_DIRECTORY)) as descriptor:
        fsync(descriptor)


@contextlib.contextmanager
def naming_path(path: Path) -> Iterator[None]:
    """Name the file in an error of the system that comes while it is written by a library.

    Raises:
        DiskFullError: If the file system or a quota is exhausted.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL or "No space left" in str(error):
            raise DiskFullError(
                f"{path} must have room, got {_size(_free_bytes(path))} free ({error}); free space "
                "and run the same command again"
            ) from error
        if error.errno is None or error.filename is not None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


def require_space(path: Path, n_bytes: int) -> None:
    """Refuse to begin what will not fit.

    Raises:
        DiskFullError: If fewer than `n_bytes` are free where `path` lies.
    """
    free = _free_bytes(path)
    if n_bytes > free:
        raise DiskFullError(
            f"{path} must have room for about {_size(n_bytes)}, got {_size(free)} free; "
            "free space, choose another directory, or ask for fewer rows"
        )


@contextlib.contextmanager
def lock(path: Path, what: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold an exclusive lock, which the system releases when the process dies.

    The file names the holder while the lock is held, and is removed after it.

    Raises:
        CacheBusyError: If another live process holds the lock for longer than `wait_s` seconds.
    """
    deadline = time.monotonic() + wait_s
    while (descriptor := _try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise CacheBusyError(
                f"{what} must have one writer, got a second one while {_holder(path)} is at work; "
                "wait for it or stop it"
            )
        time.sleep(0.01)
    try:
        with contextlib.suppress(OSError):  # the name is a courtesy; a full disk may refuse it
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        # Removed while still locked, and `_try_lock` looks again, so nobody locks a dead name.
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of a result while it is made; its directory is made if it is missing.

    A directory that was made and in which nothing was written is removed.

    Raises:
        CacheBusyError: If another live process makes the same result.
    """
    was_there = path.parent.is_dir()
    make_directory(path.parent)
    try:
        with lock(path, what):
            yield
    finally:
        if not was_there:
            with contextlib.suppress(OSError):  # it holds something
                path.parent.rmdir()


def _try_lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:  # a file system that has none
        os.close(descriptor)
        raise OSError(
            f"{path} must be on a file system with locks, got {error.strerror!r}; write to another "
            "one, or mount it with them"
        ) from error
    os.close(descriptor)
    return None


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip() or "another process"
    except FileNotFoundError:
        return "another process"


def _write_temporary(path: Path, data: Buffer | Parts) -> None:
    with _closing(open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)) as descriptor:
        for part in data.parts if isinstance(data, Parts) else (data,):
            if isinstance(part, np.ndarray):
                part = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            write(descriptor, memoryview(part))  # pyright: ignore[reportArgumentType]
        fsync(descriptor)


def temporary(path: Path) -> Path:
    """Return where a file lies while it is written."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _reporting_full_disk(path: Path, n_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFullError(
            f"{path} must have room for {_size(n_bytes)}, got {_size(_free_bytes(path))} free "
            f"({error.strerror}); free space and run the same command again"
        ) from error


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _size(n_bytes: int) -> str:
    return f"{n_bytes:,} bytes" if n_bytes < 10**6 else f"{n_bytes / 1e6:,.1f} MB"
