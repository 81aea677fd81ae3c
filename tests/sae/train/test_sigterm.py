"""SIGTERM in each phase of a run: a checkpoint and the exit within a step; the rest as ever."""

import dataclasses
import itertools
import os
import signal
import time

import pytest

from activations_cache.testing import synthetic_plan, write_synthetic
from sae.architecture import BatchTopK, TopK
from sae.train import checkpoint, module, throughput
from sae.train.config import AuxK, DictionaryConfig, TrainConfig
from sae.train.fit import train
from sae.train.forward import run as forward
from sae.train.module import SAEModule
from sae.train.signals import Stopped

SAES = {
    "topk": DictionaryConfig(d_sae=30, activation=TopK(k=3), auxk=AuxK(), dead_after_tokens=303),
    "batchtopk": DictionaryConfig(d_sae=22, activation=BatchTopK(k=2)),
}
CONFIG = TrainConfig(
    saes=SAES, batch=101, epochs=9, precision="fp32", log_every=5, checkpoint_seconds=1e-3
)
PHASES = {
    "forward": (forward, "forward", 9),
    "save": (checkpoint.io, "rename", 3),
    "verify": (checkpoint, "_verified", 2),
    "remove": (checkpoint.shutil, "rmtree", 1),
    "log": (throughput.Meter, "read", 1),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    plan = synthetic_plan({"a.1:out": 7}, n_examples=119, dtype="float32")
    return write_synthetic(tmp_path_factory.mktemp("cache") / "cache", plan)


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    train(cache, CONFIG, path)
    return path


def terminated_at(monkeypatch, owner, name, number, marker):
    """Send this process SIGTERM in the middle of the call with that number."""
    calls, original = itertools.count(1), getattr(owner, name)

    def call(*args, **named):
        if next(calls) == number:
            marker.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **named)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_ends_with_a_checkpoint_and_goes_on_to_the_same_bits(
    cache, whole, tmp_path, in_processes, phase, figure
):
    """Checkpoints are written beside the steps, so a signal in a write is one in a step."""
    run, marker = tmp_path / "run", tmp_path / "marker"
    with pytest.MonkeyPatch.context() as patch:
        # one checkpoint after the other, however slow the disk is
        patch.setattr(checkpoint, "SHARE", 1.0)
        patch.setattr(checkpoint.io, "fsync", lambda descriptor: None)
        terminated_at(patch, *PHASES[phase], marker)
        [(process, said)] = in_processes(1, lambda: train(cache, CONFIG, run)).items()
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 143, said.read_text()
    assert time.time() - float(marker.read_text()) < 5
    assert list(run.glob("checkpoints/*/manifest.json"))
    assert not (run / "topk").exists()
    train(cache, CONFIG, run)
    for name in SAES:
        ours, theirs = (path / name / "sae.safetensors" for path in (run, whole))
        assert ours.read_bytes() == theirs.read_bytes()
    figure("T3", f"SIGTERM in phase {phase}: saved, exit 143 within 5 s, the same bits after it")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_step_that_is_announced_lies_on_the_disk(cache, whole, tmp_path, number):
    """Nothing else is saved meanwhile: no checkpoint is due before the run's end."""
    config = dataclasses.replace(CONFIG, checkpoint_seconds=3600.0)
    n_steps = cache.n_batches(batch=config.batch, epochs=config.epochs)
    steps = {"before": 0, "after": 0}

    def counted(phase, stop_at=None):
        original = SAEModule.step

        def step(self, *args, **named):
            steps[phase] += 1
            if steps[phase] == stop_at:
                os.kill(os.getpid(), number)
            return original(self, *args, **named)

        return step

    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAEModule, "step", counted("before", stop_at=4))
        with pytest.raises(Stopped) as stop:
            train(cache, config, tmp_path)
    for each, handler in handlers.items():
        signal.signal(each, handler)
    assert stop.value.code == 128 + number
    assert "after step 4, which is saved" in stop.value.message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAEModule, "step", counted("after"))
        train(cache, config, tmp_path)
    assert steps == {"before": 4, "after": n_steps - 4}
    for name in SAES:
        ours, theirs = (path / name / "sae.safetensors" for path in (tmp_path, whole))
        assert ours.read_bytes() == theirs.read_bytes()


def test_before_the_first_step_and_after_the_last_a_signal_ends_the_process_at_once(
    cache, tmp_path, in_processes, monkeypatch
):
    """There is nothing to save while dictionaries are made, nor when they are evaluated."""

    def training_then_evaluation():
        train(cache, CONFIG, tmp_path / "run")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    def start():
        terminated_at(monkeypatch, module, "new_autoencoder", 2, tmp_path / "marker")
        train(cache, CONFIG, tmp_path / "begun")

    for work in (start, training_then_evaluation):
        began = time.monotonic()
        [process] = in_processes(1, work)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGTERM
        assert time.monotonic() - began < 25
    assert [file.name for file in (tmp_path / "begun").iterdir()] == [".train.lock"]
    assert (tmp_path / "run" / "topk" / "sae.safetensors").exists()
