"""Claiming, committing and going on: a shard has one writer and is written once."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from activations_cache import io
from activations_cache.checks import CacheBusyError, CacheFormatError, DiskFullError
from activations_cache.journal import journals_at, newest
from activations_cache.manifest import Plan, read_manifest
from activations_cache.reader import open_cache
from activations_cache.testing import LinearModel, synthetic_plan, write_synthetic
from activations_cache.writer import CacheWriter


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced when is tested elsewhere."""
    monkeypatch.setattr(io, "fsync", lambda descriptor: None)


@pytest.fixture
def plan() -> Plan:
    """23 examples of 17 tokens; 3 examples to a shard of 61 rows, the last shard with 2."""
    return synthetic_plan({"a.1:out": 7, "a.2:in": 5}, n_examples=23)


def content(path: Path) -> dict[str, bytes]:
    """Everything in a cache that is a pure function of its identity."""
    varying = ("journal", "manifest.json", ".locks")
    files = (p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file())
    return {str(f): (path / f).read_bytes() for f in files if not str(f).startswith(varying)}


def test_the_order_of_the_shards_and_the_number_of_writers_do_not_matter(
    tmp_path: Path, plan: Plan
):
    model = LinearModel(plan)
    write_synthetic(tmp_path / "one", plan)
    for rank in (1, 0, 2):
        with CacheWriter(tmp_path / "three", plan, rank=rank) as writer:
            for shard in reversed(range(rank, plan.n_shards, 3)):
                with writer.claim(shard):
                    writer.commit(model.shard(shard))
    with CacheWriter(tmp_path / "three", plan, rank=7) as writer:
        assert writer.missing() == []
        writer.finish({})
    assert content(tmp_path / "one") == content(tmp_path / "three")
    one, three = open_cache(tmp_path / "one"), open_cache(tmp_path / "three")
    assert one.manifest.statistics == three.manifest.statistics
    assert one.fingerprint == three.fingerprint


def test_each_rank_takes_its_own_shards_first(tmp_path: Path, plan: Plan):
    model, order = LinearModel(plan), []
    with CacheWriter(tmp_path, plan, rank=1) as writer:
        for shard in writer.claims(3):
            order.append(shard)
            writer.commit(model.shard(shard))
    assert order == [1, 4, 7, 0, 2, 3, 5, 6]


def test_a_second_live_writer_is_refused_within_a_second(tmp_path: Path, plan: Plan):
    with CacheWriter(tmp_path, plan) as first, first.claim(3):
        began = time.monotonic()
        with pytest.raises(
            CacheBusyError, match=r"rank 0 of .* must have one writer, got a second"
        ):
            CacheWriter(tmp_path, plan).__enter__()
        with (
            CacheWriter(tmp_path, plan, rank=1) as second,
            pytest.raises(CacheBusyError, match=r"shard 3 of .* must have one writer"),
        ):
            second.claim(3).__enter__()
        assert time.monotonic() - began < 1


def test_claimed_shards_of_others_are_left_out_until_they_are_there(tmp_path: Path, plan: Plan):
    model = LinearModel(plan)
    with CacheWriter(tmp_path, plan, rank=0) as one, CacheWriter(tmp_path, plan, rank=1) as other:
        claimed, claims = one.claim(2), other.claims(2)
        claimed.__enter__()
        taken = []
        for shard in claims:
            taken.append(shard)
            other.commit(model.shard(shard))
            if len(taken) == plan.n_shards - 1:
                one.commit(model.shard(2))
                claimed.__exit__(None, None, None)
        assert sorted([*taken, 2]) == list(range(plan.n_shards))


def test_an_error_lets_the_claimed_shard_go(tmp_path: Path, plan: Plan):
    with CacheWriter(tmp_path, plan) as writer:
        claims = writer.claims()
        assert next(claims) == 0
    with CacheWriter(tmp_path, plan) as writer, writer.claim(0):
        assert next(writer.claims()) == 1
    assert list((tmp_path / ".locks").iterdir()) == []


KILLED = """
import os, pathlib, signal, sys
from activations_cache.testing import LinearModel, synthetic_plan
from activations_cache.writer import CacheWriter
plan = synthetic_plan({"a.1:out": 7, "a.2:in": 5}, n_examples=23)
writer = CacheWriter(pathlib.Path(sys.argv[1]), plan).__enter__()
for shard in writer.claims():
    if shard == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    writer.commit(LinearModel(plan).shard(shard))
"""


def test_a_restart_after_a_kill_goes_on_at_once(tmp_path: Path, plan: Plan):
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False).returncode == -9
    began = time.monotonic()
    with CacheWriter(tmp_path, plan) as writer:
        assert writer.missing() == [5, 6, 7]
    assert time.monotonic() - began < 1


def test_going_on_writes_only_what_is_missing_or_damaged(tmp_path: Path, plan: Plan):
    model = LinearModel(plan)
    write_synthetic(tmp_path / "whole", plan)
    with CacheWriter(tmp_path / "cache", plan) as writer:
        for shard in (0, 1, 2, 3):
            writer.commit(model.shard(shard))
    acts = tmp_path / "cache" / "a.1:out/acts/c"
    damaged = bytearray((acts / "1/0").read_bytes())
    damaged[5] ^= 4
    (acts / "1/0").write_bytes(damaged)
    (acts / "2/0").unlink()
    with CacheWriter(tmp_path / "cache", plan) as writer:
        assert writer.missing() == [1, 2, 4, 5, 6, 7]
        for shard in writer.claims():
            writer.commit(model.shard(shard))
        writer.finish({})
    records = newest(journals_at(tmp_path / "cache"))
    assert [record.attempt for record in records.values()] == [1, 2, 2, 1, 1, 1, 1, 1]
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


def test_a_complete_cache_with_a_damaged_shard_is_repaired(tmp_path: Path, plan: Plan):
    write_synthetic(tmp_path, plan)
    before = content(tmp_path)
    (tmp_path / "rows/token/c/6").write_bytes(bytes(61 * 4))
    assert open_cache(tmp_path).verify() != []
    cache = write_synthetic(tmp_path, plan)
    assert cache.verify() == []
    assert content(tmp_path) == before


def test_nothing_is_written_into_a_complete_cache(tmp_path: Path, plan: Plan):
    write_synthetic(tmp_path, plan)
    manifest = (tmp_path / "manifest.json").read_bytes()
    with CacheWriter(tmp_path, plan, rank=3) as writer:
        assert list(writer.claims()) == []
        writer.finish({})
    assert (tmp_path / "manifest.json").read_bytes() == manifest


def test_a_directory_of_another_identity_is_refused_with_the_key(tmp_path: Path, plan: Plan):
    with CacheWriter(tmp_path, plan):
        pass
    other = replace(plan, made_from={"model": "linear", "seed": 1})
    with pytest.raises(CacheFormatError, match="got another seed: expected 1, got 0; choose"):
        CacheWriter(tmp_path, other).__enter__()
    other = replace(plan, hook_points={"a.1:out": 11})
    with pytest.raises(
        CacheFormatError, match=r"got another hook_points\.a\.1:out: expected 11, got 7"
    ):
        CacheWriter(tmp_path, other).__enter__()


def test_a_directory_with_other_files_is_refused(tmp_path: Path, plan: Plan):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(CacheFormatError, match="must be empty or hold a cache, got other files"):
        CacheWriter(tmp_path, plan).__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unfinished_cache_is_not_finished(tmp_path: Path, plan: Plan):
    with (
        CacheWriter(tmp_path, plan) as writer,
        pytest.raises(CacheFormatError, match="all 8 shards to be finished, got none for 8"),
    ):
        writer.finish({})
    assert read_manifest(tmp_path) is None


def test_what_will_not_fit_is_refused_before_the_first_shard(tmp_path: Path):
    plan = replace(synthetic_plan({"a.1:out": 10**6}, n_examples=10**8), rows_per_shard=10**6)
    with pytest.raises(DiskFullError, match=r"must have room for about [\d,.]+ MB, got [\d,.]+ MB"):
        CacheWriter(tmp_path, plan).__enter__()


def test_a_torn_line_is_dropped_and_its_shard_written_again(tmp_path: Path, plan: Plan):
    model = LinearModel(plan)
    with CacheWriter(tmp_path, plan) as writer:
        for shard in (0, 1):
            writer.commit(model.shard(shard))
    journal = tmp_path / "journal.rank0.jsonl"
    whole = journal.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (first + 1, (first + len(whole)) // 2, len(whole) - 1):
        journal.write_bytes(whole[:cut])
        with CacheWriter(tmp_path, plan) as writer:
            assert writer.missing() == [1, 2, 3, 4, 5, 6, 7]
            assert journal.read_bytes() == whole[:first]
            writer.commit(model.shard(1))
        assert journal.read_bytes() == whole


def test_a_damaged_line_is_no_line(tmp_path: Path, plan: Plan, caplog: pytest.LogCaptureFixture):
    model = LinearModel(plan)
    with CacheWriter(tmp_path, plan) as writer:
        for shard in (0, 1, 2):
            writer.commit(model.shard(shard))
    journal = tmp_path / "journal.rank0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"valid_rows": 48', b'"valid_rows": 47')
    journal.write_bytes(b"".join(lines))
    with CacheWriter(tmp_path, plan) as writer:
        assert writer.missing() == [1, 3, 4, 5, 6, 7]
    assert "must match its own checksum" in caplog.text
