"""A training on a world, killed and begun again, ends with the bits of one that was let alone."""

from dataclasses import replace

import pytest
import torch

from benchmarks import ground_truth
from benchmarks.ground_truth_recipes import new_step
from benchmarks.resumable import Checkpoints, train
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
    every_step = Checkpoints(tmp_path, "these two", 0.0)
    with pytest.raises(Killed):
        train(killed, lambda start: rows(start, 13), every_step)
    starts = []

    def rest(start):
        starts.append(start)
        return rows(start)

    train(again, rest, every_step)
    assert starts == [13]
    for name, step in whole.items():
        for key, tensor in step.state_dict().items():
            assert torch.equal(again[name].state_dict()[key], tensor), (name, key)


def test_checkpoints_of_other_arguments_are_left_alone(tmp_path):
    with pytest.raises(Killed):
        train(new_steps(), lambda start: rows(start, 5), Checkpoints(tmp_path, "these two", 0.0))
    starts = []

    def rest(start):
        starts.append(start)
        return rows(start)

    train(new_steps(), rest, Checkpoints(tmp_path, "others", 0.0))
    assert starts == [0]


def test_the_command_goes_on_from_its_checkpoints(tmp_path, monkeypatch, capsys):
    arguments = ["ground_truth", "--tier", "pentagon", "--seeds", "1", "--rows", "2900", "--batch"]
    arguments += ["29", "--arms", "topk", "--checkpoints", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*arguments, "--checkpoint-seconds", "0"])
    ground_truth.main()
    first = capsys.readouterr().out
    made = sorted((tmp_path / "seed-0").iterdir())
    assert [path.name for path in made] == ["step-00000099", "step-00000100"]
    monkeypatch.setattr(ground_truth, "batches", lambda *_, **__: iter(()))
    ground_truth.main()
    assert capsys.readouterr().out == first
