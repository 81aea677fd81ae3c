"""Killed at any moment and resumed, or beside others: training ends with the same bits."""

import dataclasses
import os
import random
import shutil
import signal
import time
import warnings

import pytest

from activations_cache.testing import synthetic_plan, write_synthetic
from sae.architecture import BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TopK
from sae.train import checkpoint
from sae.train.config import Adam, DictionaryConfig, TrainConfig
from sae.train.fit import train
from sae.train.loss_config import L0, L1, AuxK, PAnneal, PreAct, RandomPrefixes, Tanh

COMMON = {"d_sae": 23, "dead_after_tokens": 303, "optimizer": Adam(lr=3e-3)}
FREE = {**COMMON, "unit_norm": False}
KINDS = {
    "topk": DictionaryConfig(activation=TopK(k=3), auxk=AuxK(), **COMMON),
    "matryoshka": DictionaryConfig(
        activation=BatchTopK(k=2), auxk=AuxK(), matryoshka=RandomPrefixes(n=3), **COMMON
    ),
    "batchtopk": DictionaryConfig(activation=BatchTopK(k=2), input_norm="rms", **COMMON),
    "relu": DictionaryConfig(activation=ReLU(), l1=L1(), **FREE),
    "annealed": DictionaryConfig(activation=ReLU(), p_anneal=PAnneal(), **FREE),
    "jumprelu": DictionaryConfig(
        activation=JumpReLU(), l0=L0(target=3.0, threshold_lr=1e-2), **COMMON
    ),
    "tanh": DictionaryConfig(activation=JumpReLU(), tanh=Tanh(), preact=PreAct(), **COMMON),
    "gated": DictionaryConfig(activation=Gated(), l1=L1(), **COMMON),
    "groupmax": DictionaryConfig(activation=GroupMax(k=3), **{**COMMON, "d_sae": 21}),
    "frozen": DictionaryConfig(activation=TopK(k=3), frozen="decoder", **COMMON),
}
SEED = 11
CONFIG = TrainConfig(
    saes=KINDS, batch=101, epochs=2, precision="fp32", checkpoint_seconds=0.01, seed=SEED
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    plan = synthetic_plan({"a.1:out": 7}, n_examples=119, dtype="float32")
    return write_synthetic(tmp_path_factory.mktemp("cache") / "cache", plan)


def started(cache, config, path):
    """Train in a process of its own; its id."""
    with warnings.catch_warnings():
        # Only this thread goes on in the child, which touches none of what the others hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process:
        return process
    try:
        train(cache, config, path)
    finally:
        os._exit(0 if all((path / name / "sae.safetensors").exists() for name in KINDS) else 1)


def kill_after_a_checkpoint(process, path, pause):
    """Wait until there is a checkpoint that was not there, then a little more; kill -9."""
    before = {p.name for p in path.glob("checkpoints/*")}
    deadline = time.monotonic() + 60
    while {p.parent.name for p in path.glob("checkpoints/*/manifest.json")} <= before:
        assert os.waitpid(process, os.WNOHANG) == (0, 0), "it must still be training"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(pause)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """What a run of every kind leaves that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole") / "run"
    train(cache, CONFIG, path)
    return path


def require_same_bits(path, whole):
    ours, theirs = newest(path), newest(whole)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not ours[name].equal(theirs[name])]
    for name in KINDS:
        assert dictionary(path, name) == dictionary(whole, name)


def dictionary(path, name):
    return (path / name / "sae.safetensors").read_bytes()


def test_a_training_of_every_kind_that_is_killed_twice_ends_with_the_same_bits(
    cache, whole, tmp_path, monkeypatch, figure
):
    monkeypatch.setattr("activations_cache.io.fsync", lambda descriptor: None)
    draw = random.Random(SEED)
    for _ in range(2):
        process = started(cache, CONFIG, tmp_path / "killed")
        kill_after_a_checkpoint(process, tmp_path / "killed", 0.1 * draw.random())
    process = started(cache, CONFIG, tmp_path / "killed")
    assert os.waitpid(process, 0)[1] == 0
    assert len(list(tmp_path.glob("killed/logs/csv/*"))) >= 2
    require_same_bits(tmp_path / "killed", whole)
    figure("T1", f"2 kill -9 in a training of {len(KINDS)} kinds: the same bits")


@pytest.mark.long
def test_thirty_random_kills_end_with_the_same_bits(cache, tmp_path, monkeypatch, figure):
    """At any moment: while dictionaries are made, in a step, while a checkpoint is written."""
    monkeypatch.setattr("activations_cache.io.fsync", lambda descriptor: None)
    config = dataclasses.replace(CONFIG, epochs=6)
    draw, n_kills = random.Random(SEED), 0
    while n_kills < 30:
        process = started(cache, config, tmp_path / "killed")
        time.sleep(draw.uniform(0.05, 1.2))
        if os.waitpid(process, os.WNOHANG) != (0, 0):  # it is done: once more from the beginning
            shutil.rmtree(tmp_path / "killed")
            continue
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        n_kills += 1
    process = started(cache, config, tmp_path / "killed")
    assert os.waitpid(process, 0)[1] == 0
    train(cache, config, tmp_path / "whole")
    require_same_bits(tmp_path / "killed", tmp_path / "whole")
    figure("T1", f"30 kill -9 in a training of {len(KINDS)} kinds: the same bits")


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone_ends_with_the_bits_that_it_has_in_the_list(kind, cache, whole, tmp_path):
    alone = dataclasses.replace(CONFIG, saes={kind: KINDS[kind]})
    train(cache, alone, tmp_path / "run")
    assert dictionary(tmp_path / "run", kind) == dictionary(whole, kind)


def newest(path):
    """Weights, moments, thresholds, counters and annealing of the last step."""
    manifest = max((path / "checkpoints").glob("*/manifest.json"))
    identity = checkpoint.json.loads(manifest.read_text())["identity"]
    result = checkpoint.load_newest(path / "checkpoints", identity)
    assert result is not None
    return result[1]
