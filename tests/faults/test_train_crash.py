"""Training may be killed at any moment: resumed, and resumed again, it ends with the same bits."""

import os
import random
import signal
import time
import warnings

import pytest

from activations_cache.synthetic import synthetic_plan, write_synthetic
from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU, TopK
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
    "frozen": DictionaryConfig(activation=TopK(k=3), frozen="decoder", **COMMON),
}
SEED = 11


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


def test_a_training_of_every_kind_that_is_killed_twice_ends_with_the_same_bits(
    cache, tmp_path, monkeypatch
):
    monkeypatch.setattr("activations_cache.io.fsync", lambda descriptor: None)
    config = TrainConfig(
        saes=KINDS, batch=101, epochs=2, precision="fp32", checkpoint_seconds=0.01, seed=SEED
    )
    draw = random.Random(SEED)
    for _ in range(2):
        process = started(cache, config, tmp_path / "killed")
        kill_after_a_checkpoint(process, tmp_path / "killed", 0.1 * draw.random())
    process = started(cache, config, tmp_path / "killed")
    assert os.waitpid(process, 0)[1] == 0
    assert len(list(tmp_path.glob("killed/logs/csv/*"))) >= 2
    train(cache, config, tmp_path / "whole")
    states = [newest(tmp_path / path) for path in ("killed", "whole")]
    assert states[0].keys() == states[1].keys()
    differ = [name for name in states[0] if not states[0][name].equal(states[1][name])]
    assert not differ
    for name in KINDS:
        ours, theirs = (tmp_path / p / name / "sae.safetensors" for p in ("killed", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()


def newest(path):
    """Weights, moments, thresholds, counters and annealing of the last step."""
    manifest = max((path / "checkpoints").glob("*/manifest.json"))
    identity = checkpoint.json.loads(manifest.read_text())["identity"]
    found = checkpoint.load_newest(path / "checkpoints", identity)
    assert found is not None
    return found[1]
