"""A disk that becomes full: one line, what was committed stays, and the build goes on later."""

import errno
import itertools
import os
import random
from pathlib import Path

import pytest

import activations_cache
from activations_cache import io
from activations_cache.checks import DiskFullError
from activations_cache.journal import journals_at, newest
from activations_cache.testing import LinearModel, synthetic_plan, write_synthetic
from activations_cache.writer import CacheWriter

PLAN = synthetic_plan({"a.1:out": 7}, n_examples=14)  # 5 shards


def content(path: Path) -> dict[str, bytes]:
    varying = ("journal", "manifest.json", ".locks")
    files = (p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file())
    return {str(f): (path / f).read_bytes() for f in files if not str(f).startswith(varying)}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "cache"
    write_synthetic(path, PLAN)
    return path


@pytest.fixture(scope="module")
def n_calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How often each primitive that may find the disk full is called."""
    counts = dict.fromkeys(("open_file", "write", "fsync", "mkdir"), 0)
    with pytest.MonkeyPatch.context() as patch:
        for name in counts:
            original = getattr(io, name)

            def counting(*args: object, name=name, original=original) -> object:
                counts[name] += 1
                return original(*args)

            patch.setattr(io, name, counting)
        write_synthetic(tmp_path_factory.mktemp("counted") / "cache", PLAN)
    return counts


def fail_from(name: str, k: int, number: int, patch: pytest.MonkeyPatch) -> None:
    """Let a primitive fail at its k-th call and ever after, as a full disk does."""
    calls, original = itertools.count(1), getattr(io, name)

    def failing(*args: object) -> object:
        if next(calls) < k:
            return original(*args)
        if name == "write":
            os.write(args[0], args[1][: len(args[1]) // 3])
        raise OSError(number, os.strerror(number))

    patch.setattr(io, name, failing)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["write", "mkdir"])
def test_a_full_disk_costs_one_line_and_no_committed_shard(
    tmp_path: Path, whole: Path, n_calls: dict[str, int], name: str, number: int
):
    made = random.Random(f"{name}.{number}")
    for k in made.sample(range(2, n_calls[name] + 1), 5):
        path = tmp_path / f"{k}"
        with pytest.MonkeyPatch.context() as patch:
            fail_from(name, k, number, patch)
            with pytest.raises(DiskFullError) as caught:
                write_synthetic(path, PLAN)
        message = str(caught.value)
        assert message.startswith(f"{path}")
        assert "\n" not in message
        assert f"free ({os.strerror(number)}); free space and run the same command" in message
        assert not list(path.rglob("*.tmp"))
        for record in newest(journals_at(path)).values():
            assert all(io.problem(path / file, d) is None for file, d in record.files.items())
        assert write_synthetic(path, PLAN).verify() == []
        assert content(path) == content(whole)


@pytest.mark.parametrize("name", ["open_file", "write", "fsync"])
def test_a_failing_disk_loses_no_committed_shard(
    tmp_path: Path, whole: Path, n_calls: dict[str, int], name: str
):
    made = random.Random(name)
    for k in made.sample(range(2, n_calls[name] + 1), 5):
        path = tmp_path / f"{k}"
        with pytest.MonkeyPatch.context() as patch:
            fail_from(name, k, errno.EIO, patch)
            with pytest.raises(OSError, match="Input/output error"):
                write_synthetic(path, PLAN)
        for record in newest(journals_at(path)).values():
            assert all(io.problem(path / file, d) is None for file, d in record.files.items())
        assert write_synthetic(path, PLAN).verify() == []
        assert content(path) == content(whole)


def test_the_same_writer_goes_on_after_space_was_made(tmp_path: Path, whole: Path):
    model = LinearModel(PLAN)
    with CacheWriter(tmp_path / "cache", PLAN) as writer:
        # Each shard has ten files; the eleventh write is the line in the journal.
        for k, shard in zip((1, 4, 7, 10, 11), writer.claims(), strict=True):
            with pytest.MonkeyPatch.context() as patch:
                fail_from("write", k, errno.ENOSPC, patch)
                with pytest.raises(DiskFullError):
                    writer.commit(model.shard(shard))
            assert shard in writer.missing()
            writer.commit(model.shard(shard))
        writer.finish({})
    assert activations_cache.open(tmp_path / "cache").verify() == []
    assert content(tmp_path / "cache") == content(whole)
