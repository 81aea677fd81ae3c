import json
import sys
from dataclasses import replace

import pytest
from torch.nn.functional import normalize

from benchmarks import ground_truth_grid, rows
from benchmarks.ground_truth_grid import LAWS, RECIPES, Cell, entry_of, recorded, world_of
from benchmarks.ground_truth_recipes import new_step
from sae.evaluate.ground_truth import make_world
from sae.train.optim_config import Tied

SMALL = "ground_truth_grid --d 13 --active 2 --steps 3 --seeds 1 --laws zipf"


@pytest.fixture
def results(tmp_path, monkeypatch):
    for module in (ground_truth_grid, rows):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path / "ground_truth_grid.jsonl"


def grid(monkeypatch, request: str) -> None:
    monkeypatch.setattr(sys, "argv", request.split())
    ground_truth_grid.main()


def test_cells_are_recorded_once_and_not_trained_again(results, monkeypatch, capsys):
    grid(monkeypatch, f"{SMALL} --recipes topk --record")
    [first] = map(json.loads, results.read_text().splitlines())
    cell = Cell(d=13, active=2, steps=3, law="zipf", seed=0, recipe="topk")
    assert Cell(**first["cell"]) == cell
    assert first["figures"] == recorded()[cell]
    assert first["figures"]["L0"] == pytest.approx(2, abs=0.1)
    assert first["together"]["dictionaries"] == 1
    grid(monkeypatch, f"{SMALL} --recipes topk gated --record")
    lines = results.read_text().splitlines()
    assert [json.loads(line)["cell"]["recipe"] for line in lines] == ["topk", "gated"]
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split()[:7] == ["d", "active", "steps", "law", "recipe", "seeds", "recovered"]
    assert [line.split()[:6] for line in table[1:]] == [
        ["13", "2", "3", "zipf", name, "1"] for name in ("gated", "topk")
    ]


def test_what_a_cpu_cannot_do_is_not_run_and_nothing_is_kept_unasked(results, monkeypatch, capsys):
    grid(monkeypatch, f"{SMALL} --recipes topk --most-seconds 0")
    assert capsys.readouterr().out.splitlines()[-1].split()[5:] == ["0", "not", "run"]
    grid(monkeypatch, f"{SMALL} --recipes topk")
    assert not results.exists()


@pytest.mark.parametrize("law", LAWS)
def test_as_many_features_are_active_as_the_cell_says(law):
    cell = Cell(d=13, active=5, steps=3, law=law, seed=0, recipe="l1")
    world = ground_truth_grid.make_world(world_of(cell), 0)
    assert float(world.rates.sum()) == pytest.approx(5, rel=1e-4)
    ratio = 16 if law == "zipf" else 1
    assert float(world.rates[0] / world.rates[-1]) == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_aims_at_the_l0_of_its_world(name):
    entry = entry_of(Cell(d=64, active=5, steps=3, law="zipf", seed=0, recipe=name))
    aims = [
        entry.activation.per_row,
        entry.control and entry.control.target,
        entry.l0 and entry.l0.target,
    ]
    assert [aim for aim in aims if aim is not None] == [5]
    assert (entry.d_sae, entry.optimizer.lr) == (384, "auto")


def test_a_dictionary_begins_at_rows_of_its_world_as_its_entry_says():
    """With k features in a row, a first direction is far nearer to one than a random one is."""
    cell = Cell(d=64, active=2, steps=3, law="uniform", seed=0, recipe="topk")
    world = make_world(world_of(cell), 0)
    entry = entry_of(cell)
    nearest = []
    for first in (entry, replace(entry, init=Tied())):
        step = new_step(world, first, 3)
        directions = normalize(step.autoencoder.dec_rows.detach(), dim=1)
        nearest.append(float((directions @ world.directions.T).max(dim=1).values.mean()))
    assert nearest[0] > 0.6 > 0.45 > nearest[1]
