"""Killed at any moment of a whole run, and run again: the same results, from cache to browser."""

import json
import os
import random
import shutil
import signal
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest

import sae.run
from tests.tiny import cache_record

STEPS = ("cache", "train", "evaluate", "explain", "steer", "browse")
# These hold a time of day, the seconds of a step, or how far each of several logs goes.
VARYING = ("cache/manifest.json", "cache/done.json", "train/curves.png", "train/done.json")
SEED = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model_dir, tiny_text) -> Path:
    """A run of all six steps, with a dictionary and its frozen twin."""
    entry = {"d_sae": 31, "activation": {"kind": "topk", "k": 4}, "dead_after_tokens": 500}
    cache = cache_record(tiny_model_dir, tiny_text, n_rows=1501) | {"rows_per_shard": 211}
    path = tmp_path_factory.mktemp("chain") / "tiny.yaml"
    record = {
        "output": str(path.parent / "run"),
        "cache": cache,
        "train": {
            "batch": 61,
            "epochs": 2,
            "precision": "fp32",
            "checkpoint_seconds": 0.05,
            "saes": {"topk": entry, "topk-frozen": {**entry, "frozen": "decoder"}},
        },
        "evaluate": {"n_contexts": 4, "n_contexts_special": 1},
        "explain": {"min_firings": 5, "min_examples": 2},
        "steer": {"latent": 3, "max_new_tokens": 3},
    }
    path.write_text(json.dumps(record))  # JSON is YAML, without aliases
    return path


def started(config) -> int:
    """Do the run in a process of its own; its id."""
    with warnings.catch_warnings():
        # Only this thread goes on in the child, which touches none of what the others hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process:
        return process
    code = 1
    try:
        sae.run.job(config)
        code = 0
    finally:
        os._exit(code)


def ended(config) -> dict[str, bytes]:
    """The results of a run that is done, which goes: its files, but for those that vary."""
    output = config.parent / "run"
    files = {str(p.relative_to(output)): p for p in output.rglob("*") if p.is_file()}
    logs = ("train/logs/", "train/checkpoints/")
    kept = [n for n in files if n not in VARYING and not n.startswith(logs)]
    bits = {name: files[name].read_bytes() for name in kept}
    shutil.rmtree(output)
    return bits


def step_at_work(output) -> str:
    """The first step of a run that has no result yet."""
    return next(step for step in STEPS if not (output / step / "done.json").exists())


@pytest.mark.long
def test_two_hundred_kills_over_the_whole_chain_change_no_result(config, monkeypatch, figure):
    monkeypatch.setattr("activations_cache.io.fsync", lambda descriptor: None)
    sae.run.job(config)
    whole = ended(config)
    began = time.monotonic()
    assert os.waitpid(started(config), 0)[1] == 0
    longest = 0.5 * (time.monotonic() - began)
    assert ended(config) == whole
    draw, killed, n_runs = random.Random(SEED), Counter(), 0
    while killed.total() < 200:
        process = started(config)
        time.sleep(draw.uniform(0, longest))
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            assert status == 0
            assert ended(config) == whole
            n_runs += 1
            continue
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        killed[step_at_work(config.parent / "run")] += 1
    assert os.waitpid(started(config), 0)[1] == 0
    assert ended(config) == whole
    assert set(killed) == set(STEPS)
    steps = ", ".join(f"{killed[step]} in {step}" for step in STEPS)
    figure("R13", f"200 kill -9 over {n_runs + 1} whole runs ({steps}): 0 files differ")
