"""Every change to the disk: whole or not at all, locked, and with one line when it is full."""

import errno
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from activations_cache import io
from activations_cache.checks import CacheBusyError, DiskFullError


def files_in(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch):
    """Make the k-th write fail as a full disk does, after half of its bytes."""

    def fail_at(k: int, number: int = errno.ENOSPC) -> None:
        calls = iter(range(1, 1000))
        write = io.write

        def failing(descriptor: int, data: memoryview) -> None:
            if next(calls) != k:
                return write(descriptor, data)
            os.write(descriptor, data[: len(data) // 2])
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(io, "write", failing)

    return fail_at


def test_files_have_the_given_bytes_and_no_temporary_is_left(tmp_path: Path):
    array = np.arange(15, dtype=np.int16).reshape(3, 5)
    io.write_files({tmp_path / "a/b/array": array, tmp_path / "text": b"one"})
    assert files_in(tmp_path) == {"a/b/array": array.tobytes(), "text": b"one"}


def test_an_array_that_is_not_contiguous_is_written_in_c_order(tmp_path: Path):
    array = np.arange(15, dtype=np.int16).reshape(3, 5).T
    io.write_files({tmp_path / "array": array})
    assert (tmp_path / "array").read_bytes() == np.ascontiguousarray(array).tobytes()


def test_files_are_synced_before_they_are_renamed_and_directories_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    for name in ("write", "fsync", "rename"):
        original = getattr(io, name)
        monkeypatch.setattr(
            io, name, lambda *args, n=name, f=original: (calls.append(n), f(*args))[1]
        )
    io.write_files({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert calls == ["write", "fsync", "write", "fsync", "rename", "rename", "fsync"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_with_path_need_and_free_bytes(
    tmp_path: Path, full_disk, number: int
):
    io.write_files({tmp_path / "a": b"old", tmp_path / "b": b"old"})
    full_disk(2, number)
    with pytest.raises(DiskFullError) as caught:
        io.write_files({tmp_path / "a": b"new", tmp_path / "b": bytes(23)})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'b'} must have room for 23 bytes, got ")
    assert " MB free (" in message
    assert os.strerror(number) in message
    assert "run the same command again" in message
    assert "\n" not in message
    assert files_in(tmp_path) == {"a": b"old", "b": b"old"}


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path, full_disk):
    full_disk(1, errno.EIO)
    with pytest.raises(OSError, match="Input/output error") as caught:
        io.write_files({tmp_path / "a": b"new"})
    assert not isinstance(caught.value, DiskFullError)
    assert not (tmp_path / "a").exists()


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path, full_disk):
    path = tmp_path / "journal"
    io.cut(path, 0)
    io.append(path, b"first\n")
    full_disk(1)
    with pytest.raises(DiskFullError, match="must have room for 7 bytes"):
        io.append(path, b"second\n")
    io.append(path, b"third\n")
    assert path.read_bytes() == b"first\nthird\n"


def test_cut_keeps_what_lies_before(tmp_path: Path):
    path = tmp_path / "journal"
    path.write_bytes(b"first\ntor")
    io.cut(path, 6)
    assert path.read_bytes() == b"first\n"


def test_more_than_is_free_is_refused_with_both_figures(tmp_path: Path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    io.require_space(tmp_path / "not" / "there", free // 2)
    with pytest.raises(DiskFullError) as caught:
        io.require_space(tmp_path / "not" / "there", 10**15)
    assert "must have room for about 1,000,000,000.0 MB, got " in str(caught.value)
    assert "MB free; free space, choose another directory" in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda p: p.unlink(), "must exist, got no such file"),
        (lambda p: p.write_bytes(bytes(6)), "must have 7 bytes, got 6"),
        (lambda p: p.write_bytes(b"1234568"), r"must have crc32c \w{8}, got \w{8}"),
    ],
)
def test_a_file_that_differs_from_its_description_is_found(tmp_path: Path, damage, problem: str):
    path = tmp_path / "file"
    path.write_bytes(b"1234567")
    described = io.describe(b"1234567")
    assert io.problem(path, described) is None
    damage(path)
    result = io.problem(path, described)
    assert result is not None
    assert re.fullmatch(f"{re.escape(str(path))} {problem}", result)


def test_the_checksum_is_crc32c(tmp_path: Path):
    # The check value of CRC-32C (Castagnoli) in the catalogue of parametrised CRC algorithms.
    assert io.crc32c(b"123456789") == "e3069283"
    assert io.crc32c(np.frombuffer(b"123456789", np.uint8)) == "e3069283"


def test_a_second_lock_is_refused_at_once_with_the_holder(tmp_path: Path):
    path = tmp_path / "a.lock"
    holder = f"got a second one while process {os.getpid()} on "
    with io.lock(path, "shard 3"):
        began = time.monotonic()
        with pytest.raises(CacheBusyError, match=f"shard 3 must have one writer, {holder}"):
            io.lock(path, "shard 3").__enter__()
        assert time.monotonic() - began < 1
    assert not path.exists()


HOLD = """
import sys, pathlib, time
from activations_cache import io
with io.lock(pathlib.Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_holds_nobody_up(tmp_path: Path):
    path = tmp_path / "a.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CacheBusyError, match=f"process {holder.pid} on "), io.lock(path, "it"):
            pass
        holder.kill()
    assert path.exists()  # left behind by the kill
    with io.lock(path, "it"):
        assert path.read_text().startswith(f"process {os.getpid()} on ")


def test_a_lock_is_waited_for_as_long_as_asked(tmp_path: Path):
    path = tmp_path / "a.lock"
    with ThreadPoolExecutor(1) as other, ExitStack() as held:
        held.enter_context(io.lock(path, "it"))

        def take() -> bool:
            with io.lock(path, "it", wait_s=30.0):
                return True

        waiting = other.submit(take)
        time.sleep(0.05)
        assert not waiting.done()
        held.close()
        assert waiting.result(timeout=10)


def test_only_one_of_many_threads_is_inside_a_lock(tmp_path: Path):
    path, inside, most = tmp_path / "a.lock", [], []

    def work(number: int) -> None:
        for _ in range(20):
            with io.lock(path, "it", wait_s=30.0):
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    with ThreadPoolExecutor(5) as threads:
        for done in [threads.submit(work, number) for number in range(5)]:
            done.result()
    assert len(most) == 100
    assert max(most) == 1
