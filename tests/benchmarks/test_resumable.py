"""A training on a world, killed and begun again, ends with the bits of one that was let alone."""

from dataclasses import replace

import pytest
import torch

from benchmarks import ground_truth
from benchmarks.ground_truth_recipes import new_step
from benchmarks.resumable import Saved, train
from sae.architecture import TopK
from sae.evaluate.ground_truth import TIERS, batches, make_world
from sae.train.config import Adam, AuxK, DictionaryConfig

WORLD = make_world(TIERS["pentagon"], 3)
N_STEPS, BATCH = 23, 29
ENTRY = DictionaryConfig(
    d_sae=7,
    activation=TopK(k=2),
    auxk=AuxK(coefficient=0.5),
    dead_after_tokens=3 * BATCH,
    optimizer=Adam(lr=1e-2, decay=0.5),
)


class Killed(Exception):
    """Stands for kill -9: nothing of the process is written after it."""


def rows(start, until=N_STEPS):
    yield from (made.x for made in batches(WORLD, BATCH, until - start, start=start))
    if until < N_STEPS:
        raise Killed


def new_steps():
    return {
        "one": new_step(WORLD, ENTRY, N_STEPS),
        "other": new_step(WORLD, replace(ENTRY, d_sae=11), N_STEPS),
    }


def test_a_killed_training_ends_with_the_same_bits(tmp_path):
    whole, killed, again = new_steps(), new_steps(), new_steps()
    train(whole, rows)
    every_step = Saved(tmp_path, "these two", 0.0)
    with pytest.raises(Killed):
        train(killed, lambda start: rows(start, 13), every_step)
    starts, seen = [], []

    def rest(start):
        starts.append(start)
        return rows(start)

    train(again, rest, every_step, seen.append)
    assert starts == [13]
    assert seen == list(range(14, N_STEPS + 1))
    for name, step in whole.items():
        for key, tensor in step.state_dict().items():
            assert torch.equal(again[name].state_dict()[key], tensor), (name, key)


def test_checkpoints_of_other_arguments_are_left_alone(tmp_path):
    with pytest.raises(Killed):
        train(new_steps(), lambda start: rows(start, 5), Saved(tmp_path, "these two", 0.0))
    starts = []

    def rest(start):
        starts.append(start)
        return rows(start)

    train(new_steps(), rest, Saved(tmp_path, "others", 0.0))
    assert starts == [0]


def test_the_command_goes_on_from_its_checkpoints(tmp_path, monkeypatch):
    arguments = ["--tier", "pentagon", "--rows", "290", "--batch", "29", "--arms", "topk"]
    arguments += ["--checkpoints", str(tmp_path), "--checkpoint-seconds", "0"]
    monkeypatch.setattr("sys.argv", ["ground_truth", *arguments])
    request = ground_truth._arguments()
    entries = {"topk": ENTRY}
    first = ground_truth._trained(WORLD, entries, request)["topk"]
    made = sorted(path.name for path in (tmp_path / "seed-3").iterdir())
    assert made == ["step-00000009", "step-00000010"]
    monkeypatch.setattr(ground_truth, "batches", lambda *_, **__: iter(()))
    again = ground_truth._trained(WORLD, entries, request)["topk"]
    assert torch.equal(again.W_dec, first.W_dec)


def test_the_published_length_is_that_of_its_tier(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ground_truth", "--tier", "full"])
    assert ground_truth._arguments().rows == 200_000_000
    monkeypatch.setattr("sys.argv", ["ground_truth"])
    assert ground_truth._arguments().rows == 1_000_000
