"""A writer may die at any moment, and the power may go: nothing committed is lost or doubled."""

import itertools
import os
import random
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import activations_cache
from activations_cache import io
from activations_cache.checks import CacheFormatError
from activations_cache.journal import journals_at, newest
from activations_cache.testing import synthetic_plan, write_synthetic

SMALL = synthetic_plan({"a.1:out": 7}, n_examples=8)  # 3 shards, the last of 2 examples
LARGE = synthetic_plan({"a.1:out": 7}, n_examples=119)  # 40 shards
PRIMITIVES = ("open_file", "write", "fsync", "rename", "mkdir", "truncate", "unlink")
CRASHED = 77


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """A killed process loses nothing that it has written; loss of power is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "fsync", lambda descriptor: None)
        yield


def content(path: Path) -> dict[str, bytes]:
    """Everything in a cache that is a pure function of its identity."""
    varying = ("journal", "manifest.json", ".locks")
    files = (p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file())
    return {str(f): (path / f).read_bytes() for f in files if not str(f).startswith(varying)}


def in_a_child(work: Callable[[], object]) -> int:
    """Run something in a forked process that never returns here; return its id."""
    with warnings.catch_warnings():
        # Only this thread goes on in the child, which touches none of what the others hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def crash_at(k: int) -> None:
    """From now on, end this process inside the k-th call of a primitive of `io`."""
    calls = itertools.count(1)

    def crashing(name: str, original: Callable) -> Callable:
        def call(*args: object) -> object:
            if next(calls) == k:
                if name == "write":  # half of it reaches the disk
                    os.write(args[0], args[1][: len(args[1]) // 2])
                os._exit(CRASHED)
            return original(*args)

        return call

    for name in PRIMITIVES:
        setattr(io, name, crashing(name, getattr(io, name)))


def write_until(path: Path, k: int) -> int:
    """Write the small cache in a child that ends at the k-th call; return its exit code."""

    def work() -> None:
        crash_at(k)
        write_synthetic(path, SMALL)

    return exit_code(in_a_child(work))


def require_sound(path: Path) -> None:
    """What the journal lists must be whole, and what opens must be right."""
    for record in newest(journals_at(path)).values():
        assert all(io.problem(path / name, file) is None for name, file in record.files.items())
    try:
        assert activations_cache.open(path).verify() == []
    except (CacheFormatError, FileNotFoundError):
        assert not (path / "manifest.json").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "cache"
    write_synthetic(path, SMALL)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "cache"
    write_synthetic(path, LARGE)
    return path


@pytest.fixture(scope="module")
def n_calls(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many calls it takes to write the small cache."""
    counted = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        for name in PRIMITIVES:
            original = getattr(io, name)
            patch.setattr(io, name, lambda *a, f=original: (next(counted), f(*a))[1])
        write_synthetic(tmp_path_factory.mktemp("counted") / "cache", SMALL)
    return next(counted)


def crash_then_finish(path: Path, small: Path, *points: int) -> None:
    """Crash at each of the points in turn, then finish in peace, and compare."""
    for k in points:
        assert write_until(path, k) in {CRASHED, 0}
        require_sound(path)
    assert write_synthetic(path, SMALL).verify() == []
    assert content(path) == content(small)


def test_a_crash_at_a_sample_of_calls_loses_nothing(
    tmp_path: Path, small: Path, n_calls: int, figure
):
    assert n_calls > 200
    made = random.Random(0)
    points = sorted({1, n_calls, *made.sample(range(2, n_calls), 28)})
    for k in points:
        assert write_until(tmp_path / f"{k}", k) == CRASHED
        crash_then_finish(tmp_path / f"{k}", small)
    figure("R2", f"a crash at {len(points)} of {n_calls} calls: 0 rows lost, the same bytes")


def test_a_crash_during_recovery_loses_nothing(tmp_path: Path, small: Path, n_calls: int):
    made = random.Random(1)
    for number in range(30):
        first, second = made.randint(1, n_calls), made.randint(1, n_calls // 3)
        crash_then_finish(tmp_path / f"{number}", small, first, second)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_crash_at_every_call_loses_nothing(tmp_path: Path, small: Path, n_calls: int, figure):
    for k in range(1, n_calls + 1):
        assert write_until(tmp_path / f"{k}", k) == CRASHED
        crash_then_finish(tmp_path / f"{k}", small)
    figure("R2", f"a crash at each of {n_calls} calls: 0 rows lost, the same bytes")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_five_hundred_crashes_during_recovery_lose_nothing(
    tmp_path: Path, small: Path, n_calls: int, figure
):
    made = random.Random(2)
    for number in range(500):
        points = [made.randint(1, n_calls) for _ in range(2)]
        crash_then_finish(tmp_path / f"{number}", small, *points)
    figure("R2", "500 pairs of crashes, the second during recovery: 0 rows lost")


def kill_after_some_shards(path: Path, made: random.Random, *, rank: int = 0) -> None:
    """Let a child commit a few shards and kill it somewhere in the next."""
    journal = path / f"journal.rank{rank}.jsonl"

    def n_lines() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    wanted = n_lines() + made.randint(1, 4)
    child = in_a_child(lambda: write_synthetic(path, LARGE, rank=rank))
    while n_lines() < wanted:
        time.sleep(0.001)
    time.sleep(made.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL


def survive_kills(path: Path, large: Path, made: random.Random) -> None:
    for _ in range(8):
        kill_after_some_shards(path, made)
        require_sound(path)
    cache = write_synthetic(path, LARGE)
    assert content(path) == content(large)
    rows = [line for journal in journals_at(path) for line in journal.read_bytes().splitlines()]
    assert len(rows) == LARGE.n_shards  # nothing was written a second time
    assert len(cache.rows()) == LARGE.n_examples * LARGE.rows_per_example
    assert cache.verify() == []


def test_eight_kills_and_a_restart_give_the_same_bytes(tmp_path: Path, large: Path, figure):
    survive_kills(tmp_path / "cache", large, random.Random(3))
    figure("R1", "8 kill -9: 0 rows lost, 0 twice, the same bytes")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_hundred_kills_give_the_same_bytes(tmp_path: Path, large: Path, figure):
    for number in range(25):
        survive_kills(tmp_path / f"{number}", large, random.Random(number))
    figure("R1", "200 kill -9: 0 rows lost, 0 twice, the same bytes")


def write_with(path: Path, n_ranks: int) -> list[int]:
    def work(rank: int) -> Callable[[], object]:
        return lambda: write_synthetic(path, LARGE, rank=rank, n_ranks=n_ranks)

    return [in_a_child(work(rank)) for rank in range(n_ranks)]


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_four_killed_writers_are_followed_by_any_number(
    tmp_path: Path, large: Path, n_ranks: int, figure
):
    made = random.Random(n_ranks)
    for _ in range(5):
        children = write_with(tmp_path / "cache", 4)
        time.sleep(made.uniform(0.01, 0.08))
        for child in children:
            os.kill(child, signal.SIGKILL)
        assert {exit_code(child) for child in children} <= {-signal.SIGKILL, 0}
        require_sound(tmp_path / "cache")
    assert [exit_code(child) for child in write_with(tmp_path / "cache", n_ranks)] == [0] * n_ranks
    assert content(tmp_path / "cache") == content(large)
    assert activations_cache.open(tmp_path / "cache").verify() == []
    figure("R6", f"4 writers killed 5 times, then {n_ranks} of them: the same bytes")
