"""Checkpoints beside the steps: a copy is written by a thread, and the step waits for the copy."""

import errno
import os
import threading

import pytest
import torch
from safetensors.torch import save as to_safetensors

from activations_cache import io
from activations_cache.checks import CacheBusyError, DiskFullError
from activations_cache.testing import synthetic_plan, write_synthetic
from sae.architecture import TopK
from sae.train import checkpoint, cost
from sae.train.checkpoint import ROOM, Saver, Snapshot
from sae.train.config import DictionaryConfig, TrainConfig
from sae.train.fit import train
from sae.train.module import SAEModule
from sae.train.ranks import ALONE
from sae.train.signals import Stopped

SAES = {"a": DictionaryConfig(d_sae=23, activation=TopK(k=3))}
CONFIG = TrainConfig(saes=SAES, batch=53, precision="fp32", checkpoint_seconds=60.0)
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.int8, torch.float64)


def state_of(n: float) -> dict[str, torch.Tensor]:
    """Of all kinds that a step has: scalars, one byte a number, a transposed one, an empty one."""
    state = {f"a/{dtype}": torch.full((5, 7), n).to(dtype) for dtype in DTYPES}
    state |= {"a/one": torch.tensor(n), "a/t": torch.arange(6.0).reshape(2, 3).T + n}
    return {**state, "a/none": torch.empty(0, 3), "a/bytes": torch.full((3,), 1, dtype=torch.uint8)}


def require_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(checkpoint, "time", made)
    return made


@pytest.fixture
def saver(tmp_path, clock):
    made = Saver(tmp_path, "id", CONFIG, ALONE, lambda *_: None)
    yield made
    made.close()


@pytest.fixture
def held(monkeypatch):
    """Writes that wait until they are let go, and are counted."""
    gate, original, begun = threading.Event(), checkpoint.save, []

    def save(root, n_steps, state, identity):
        begun.append(n_steps)
        assert gate.wait(60)
        return original(root, n_steps, state, identity)

    monkeypatch.setattr(checkpoint, "save", save)
    gate.begun = begun
    return gate


def saved(root):
    return sorted(int(path.parent.name[5:]) for path in root.glob("step-*/manifest.json"))


def test_the_file_is_the_one_that_safetensors_writes(tmp_path):
    state = {**state_of(3.0), "a.é": torch.ones(2)}
    path = checkpoint.save(tmp_path, 1, state, "id")
    contiguous = {name: t.contiguous() for name, t in state.items()}
    assert (path / checkpoint.STATE).read_bytes() == to_safetensors(contiguous)


def test_a_snapshot_has_the_numbers_and_none_of_the_memory_and_is_used_again():
    state, snapshot = state_of(3.0), Snapshot()
    first = snapshot.take(state)
    require_equal(first.state, state)
    assert first.whole() == 0.0
    for tensor in state.values():
        tensor.zero_()
    require_equal(first.state, state_of(3.0))
    second = snapshot.take(state_of(5.0))
    require_equal(second.state, state_of(5.0))
    for name in state:
        assert second.state[name].data_ptr() == first.state[name].data_ptr()
    more = {**state_of(7.0), "a/later": torch.ones(999)}  # Adam's moments come with a first step
    require_equal(snapshot.take(more).state, more)


def test_steps_go_on_while_a_checkpoint_is_written_and_change_nothing_of_it(saver, clock, held):
    weights = {"a/x": torch.zeros(307)}

    def step(n, seconds=61.0):
        clock.now += seconds
        weights["a/x"] += 1
        saver(n, 99, lambda: dict(weights))

    step(1)
    for n in (2, 3, 4):  # due as well, and one write is on its way
        step(n)
    assert held.begun == [1]
    held.set()
    saver._write.result()
    step(5, seconds=1.0)  # it is late: not 60 s are waited for anew
    assert saver._write is not None
    saver.settle()
    assert held.begun == [1, 5]
    assert saved(saver.root) == [1, 5]
    n_steps, state = checkpoint.load_newest(saver.root, "id")
    assert (n_steps, state["a/x"].unique().tolist()) == (5, [5.0])
    io.unlink(saver.root / "step-00000005" / checkpoint.MANIFEST)
    n_steps, state = checkpoint.load_newest(saver.root, "id")
    assert (n_steps, state["a/x"].unique().tolist()) == (1, [1.0])


def test_the_interval_grows_until_steps_wait_for_a_hundredth_of_the_time(
    saver, clock, caplog, monkeypatch
):
    """A copy of 3 s is paid for by 300 s of steps."""
    take = Snapshot.take

    def slow(snapshot, state):
        clock.now += 3.0
        return take(snapshot, state)

    monkeypatch.setattr(Snapshot, "take", slow)
    times = []
    for n in range(1, 1000):
        clock.now += 1.0
        before = clock.now
        saver(n, 2000, lambda: state_of(1.0))
        saver.settle()
        if clock.now > before:
            times.append(before - saver.began)
    # the first one after checkpoint_seconds; the nth is paid for when n times 300 s have passed
    assert times == [60.0, 600.0, 900.0]
    assert saver.waited == 9.0
    [line] = [record.getMessage() for record in caplog.records]
    assert "less often than train.checkpoint_seconds=60 says: steps waited 3.0 s" in line


def test_room_for_the_first_copy_is_made_beside_the_steps_before_it_is_due(saver, clock):
    sizes, state = [], state_of(1.0)
    for n in range(1, 62):
        clock.now += 1.0
        saver(n, 2000, lambda: state)
        if saver._reserving is not None:
            saver._reserving.result()
        sizes.append(len(saver._snapshot._room))
    needed = sizes[59]  # the copy of the first checkpoint lies in it
    assert needed >= sum(t.nbytes for t in state.values())
    assert sizes == [0] * 29 + [needed] * 32
    saver.settle()
    assert saved(saver.root) == [60]


def test_a_run_that_ends_before_its_first_checkpoint_takes_no_memory_for_it(saver, clock):
    for n in range(1, 30):
        clock.now += 1.0
        saver(n, 29, lambda: state_of(1.0))
    assert saver._reserving is None
    assert len(saver._snapshot._room) == 0


def test_cheap_checkpoints_come_as_often_as_they_are_asked_for(saver, clock, caplog):
    times = []
    for n in range(1, 500):
        clock.now += 1.0
        before = saver.saved_at
        saver(n, 2000, lambda: state_of(1.0))
        saver.settle()
        times += [saver.saved_at - saver.began] if saver.saved_at > before else []
    assert times == [60.0 * n for n in range(1, 9)]
    assert not caplog.records


def test_a_copy_that_does_not_fit_is_not_made_and_that_is_said_once(
    saver, clock, monkeypatch, caplog
):
    n_bytes = 20 * 64  # room for a tensor is a multiple of 64 bytes
    state = {f"a/{n}": torch.full((9,), float(n)) for n in range(20)}
    free = [int(n_bytes / ROOM) - 1]
    monkeypatch.setattr(cost, "free_on_cpu", lambda: free[0])
    for n in (1, 2):
        clock.now += 61
        saver(n, 99, lambda: state)
        assert saver._write is None
        assert saved(saver.root)[-1] == n
    require_equal(checkpoint.load_newest(saver.root, "id")[1], state)
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("the steps wait while checkpoints are written: a copy of 0.0 GiB does")
    free[0] += 2
    clock.now += 61
    saver(3, 99, lambda: state)
    assert saver._write is not None


def test_memory_that_the_system_does_not_give_is_no_end_of_the_run(monkeypatch, caplog):
    def refused(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    snapshot, state = Snapshot(), state_of(1.0)
    monkeypatch.setattr(checkpoint.torch, "empty", refused)
    assert snapshot.take(state) is None
    assert len(caplog.records) == 1


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    plan = synthetic_plan({"a:out": 7}, n_examples=101, dtype="float32")
    return write_synthetic(tmp_path_factory.mktemp("cache") / "cache", plan)


OFTEN = TrainConfig(saes=SAES, batch=53, epochs=8, precision="fp32", checkpoint_seconds=1e-3)


def full_from(monkeypatch, n_checkpoints):
    """A disk that has room for so many checkpoints."""
    open_file, opened = io.open_file, set()

    def limited(path, flags):
        if path.name == f".{checkpoint.STATE}.tmp":
            opened.add(path)
            if len(opened) > n_checkpoints:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open_file(path, flags)

    monkeypatch.setattr(io, "open_file", limited)
    monkeypatch.setattr(io, "fsync", lambda descriptor: None)
    monkeypatch.setattr(checkpoint, "SHARE", 1.0)


def test_a_full_disk_ends_the_run_in_one_line_and_the_newest_can_be_loaded(
    cache, tmp_path, monkeypatch, figure
):
    full_from(monkeypatch, 2)
    with pytest.raises(DiskFullError, match=r"state.safetensors must have room for .* bytes") as e:
        train(cache, OFTEN, tmp_path / "run")
    assert "\n" not in str(e.value)
    before = saved(tmp_path / "run" / "checkpoints")
    assert len(before) == 2
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]
    monkeypatch.undo()
    begun, step = [], SAEModule.step
    monkeypatch.setattr(SAEModule, "step", lambda m, x: (begun.append(m.n_steps), step(m, x))[1])
    train(cache, OFTEN, tmp_path / "run")
    assert begun[0] == before[-1]
    figure("T2", "a disk that is full while steps go on: one line, the run goes on from before it")


def test_a_write_that_failed_does_not_keep_the_last_one_back(saver, clock, monkeypatch, caplog):
    """At a signal, and at the end, what can be saved is saved."""
    original, calls = checkpoint.save, []

    def save(*given):
        calls.append(given)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "the disk")
        return original(*given)

    monkeypatch.setattr(checkpoint, "save", save)
    clock.now += 61
    saver(1, 99, lambda: state_of(1.0))
    with pytest.raises(OSError, match="Input/output"):
        saver._write.result()
    saver.save(2, state_of(2.0))
    assert saved(saver.root) == [2]
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("a checkpoint was not written: [Errno 5] Input/output error")


def test_a_signal_waits_for_the_write_and_writes_its_own(saver, clock, held):
    clock.now += 61
    saver(1, 99, lambda: state_of(1.0))
    saver.signals.received = 15
    threading.Timer(0.2, held.set).start()
    with pytest.raises(Stopped):
        saver(2, 99, lambda: state_of(2.0))
    assert saved(saver.root) == [1, 2]
    require_equal(checkpoint.load_newest(saver.root, "id")[1], state_of(2.0))


def test_an_error_of_a_step_waits_for_the_write_before_others_may_train_here(
    cache, tmp_path, monkeypatch, held
):
    """The directory's lock is given back when nothing is written any more."""
    run, step, refused = tmp_path / "run", SAEModule.step, []

    def failing(module, x):
        if held.begun:
            threading.Timer(0.3, held.set).start()
            raise FloatingPointError("of the numbers")
        return step(module, x)

    def while_it_is_written():
        with pytest.raises(CacheBusyError):
            train(cache, CONFIG, run)
        refused.append(True)

    save = checkpoint.save

    def beside(*given):
        thread = threading.Thread(target=while_it_is_written)
        thread.start()
        path = save(*given)
        thread.join()
        return path

    monkeypatch.setattr(checkpoint, "save", beside)
    monkeypatch.setattr(SAEModule, "step", failing)
    with pytest.raises(FloatingPointError, match="of the numbers"):
        train(cache, OFTEN, run)
    assert refused == [True]
    assert saved(run / "checkpoints") == held.begun
    assert not (run / ".train.lock").exists()


def test_several_processes_save_beside_their_steps_and_go_on_with_the_same_bits(
    cache, tmp_path, in_processes, monkeypatch
):
    """The first one writes; killed in the middle of it, all go on from the one before."""
    monkeypatch.setattr(checkpoint, "SHARE", 1.0)
    monkeypatch.setattr(io, "fsync", lambda descriptor: None)
    saes = {"a": DictionaryConfig(d_sae=24, activation=TopK(k=3))}
    for shards in (1, 2):
        config = TrainConfig(
            saes=saes, batch=53, epochs=4, precision="fp32", checkpoint_seconds=1e-3,
            latent_shards=shards,
        )  # fmt: skip
        runs = {name: tmp_path / f"{name}-{shards}" for name in ("whole", "killed")}

        def killed(config=config, run=runs["killed"]):
            rename, n = io.rename, []

            def fatal(source, target):
                n.append(target)
                if len(n) == 6:  # of the third checkpoint the state is renamed, not the manifest
                    os.kill(os.getpid(), 9)
                rename(source, target)

            io.rename = fatal
            train(cache, config, run)

        codes = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in in_processes(2, killed)]
        assert codes[0] == -9
        assert len(saved(runs["killed"] / "checkpoints")) == 2
        for name in ("killed", "whole"):
            processes = in_processes(2, lambda c=config, run=runs[name]: train(cache, c, run))
            for process, said in processes.items():
                assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, said.read_text()
        one, other = (run / "a" / "sae.safetensors" for run in runs.values())
        assert one.read_bytes() == other.read_bytes()
