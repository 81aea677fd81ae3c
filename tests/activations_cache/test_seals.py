"""Results that are read back: listed with their checksums, compared when they are read."""

import os
import random
import time

import pytest

from activations_cache import io, seals
from activations_cache.checks import DamagedFileError, DiskFullError


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


@pytest.mark.parametrize("name", ["a.json", seals.LIST])
def test_every_flipped_bit_is_refused_by_name(tmp_path, name):
    seals.write(tmp_path, {"a.json": b'{"x": 1}', "b.bin": bytes(7)})
    data = (tmp_path / name).read_bytes()
    for bit in range(8 * len(data)):
        (tmp_path / name).write_bytes(flipped(data, bit))
        with pytest.raises(DamagedFileError, match=str(tmp_path / name)):
            seals.read(tmp_path / "a.json")
    (tmp_path / name).write_bytes(data)
    assert seals.read(tmp_path / "a.json") == b'{"x": 1}'


@pytest.mark.parametrize("damage", [b"", b'{"x": 1', b'{"x": 1}x', None])
def test_what_is_cut_longer_or_gone_is_refused(tmp_path, damage):
    seals.write(tmp_path, {"a.json": b'{"x": 1}'})
    (tmp_path / "a.json").unlink()
    if damage is not None:
        (tmp_path / "a.json").write_bytes(damage)
    with pytest.raises(DamagedFileError, match=r"a\.json must .* run it again"):
        seals.require_whole(tmp_path / "a.json", advice="run it again")


def test_what_no_list_names_is_taken_as_it_is(tmp_path):
    (tmp_path / "old.json").write_bytes(b"{}")
    assert seals.read(tmp_path / "old.json") == b"{}"
    seals.write(tmp_path, {"new.json": b"[]"})
    (tmp_path / "old.json").write_bytes(b"{ }")
    assert seals.read(tmp_path / "old.json") == b"{ }"


def test_a_file_that_is_written_anew_is_listed_anew(tmp_path):
    seals.write(tmp_path, {"a": b"1", "b/c": b"2"})
    seals.write(tmp_path, {"a": b"333"})
    assert seals.read(tmp_path / "a") == b"333"
    assert seals.read(tmp_path / "b/c", tmp_path) == b"2"
    assert seals.listed(tmp_path)["a"]["bytes"] == 3
    seals.remove(tmp_path, ("a",))
    assert seals.listed(tmp_path).keys() == {"b/c"}
    assert not (tmp_path / "a").exists()


def test_a_crash_at_any_point_leaves_nothing_that_is_refused(tmp_path, monkeypatch):
    class CrashError(BaseException):
        pass

    made = random.Random(0)
    seals.write(tmp_path, {"a": b"old", "b": b"kept"})
    for k in range(60):
        left = k

        def step(real):
            def call(*given):
                nonlocal left
                left -= 1
                if left < 0:
                    raise CrashError
                return real(*given)

            return call

        with monkeypatch.context() as patch:
            for name in ("open_file", "write", "fsync", "rename", "unlink"):
                patch.setattr(io, name, step(getattr(io, name)))
            new = made.randbytes(made.randrange(9))
            try:
                seals.write(tmp_path, {"a": new})
                done = True
            except CrashError:
                done = False
        assert seals.read(tmp_path / "b") == b"kept"
        result = seals.read(tmp_path / "a")
        assert not done or result == new
        seals.write(tmp_path, {"a": b"old"})
    assert done


def test_a_damaged_list_is_begun_anew_by_what_is_written(tmp_path):
    seals.write(tmp_path, {"a": b"1"})
    (tmp_path / seals.LIST).write_bytes(b"{}")
    assert seals.is_damaged(tmp_path)
    seals.write(tmp_path, {"b": b"2"})
    assert seals.listed(tmp_path).keys() == {"b"}


def test_a_file_written_in_pieces_appears_whole(tmp_path):
    with seals.replacing(tmp_path / "new" / "a") as unfinished:
        unfinished.write_bytes(b"12")
        assert not (tmp_path / "new" / "a").exists()
    assert seals.read(tmp_path / "new" / "a") == b"12"
    with pytest.raises(ZeroDivisionError), seals.replacing(tmp_path / "new" / "a") as unfinished:
        unfinished.write_bytes(b"3" * (1 // 0))
    assert seals.read(tmp_path / "new" / "a") == b"12"
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"a", seals.LIST}


def test_a_full_disk_is_named_with_its_path(tmp_path):
    with (
        pytest.raises(DiskFullError, match=f"{tmp_path / 'a'} must have room"),
        seals.replacing(tmp_path / "a"),
    ):
        raise OSError(28, "No space left on device")


def test_results_of_a_step_are_described_from_its_directory(tmp_path):
    io.write_files({tmp_path / "one" / "a": b"1", tmp_path / "two" / "b": b"22"})
    files = seals.describe_all(tmp_path / "one", [tmp_path / "one" / "a", tmp_path / "two" / "b"])
    assert list(files) == ["a", "../two/b"]
    assert io.problem(tmp_path / "one" / "../two/b", files["../two/b"]) is None
    assert files["a"] == io.describe(b"1")


def test_a_file_that_lies_still_is_read_once(tmp_path, monkeypatch):
    seals.write(tmp_path, {"a": b"1"})
    calls = []
    real = io.problem
    monkeypatch.setattr(io, "problem", lambda *given: calls.append(1) or real(*given))
    for _ in range(2):
        seals.require_whole(tmp_path / "a")
    assert len(calls) == 2
    long_ago = time.time() - 60
    os.utime(tmp_path / "a", (long_ago, long_ago))
    for _ in range(3):
        seals.require_whole(tmp_path / "a")
    assert len(calls) == 3
