"""`sae compare`'s figures as a row and tables; the configs of the committed comparisons."""

import dataclasses
import json

import pytest

from benchmarks import compare_recipes
from sae.config import load
from sae.run.config import RunConfig

EFFECT = {key: {"value": 0.5} for key in ("ce_recovered_mean", "ce_increase", "kl")}
DOWNSTREAM = {"knn": {"value": 0.625}, "linear": {"value": 0.75}}
RECORD = {
    "l0": 32.0,
    "groups": {"a-0": "a", "a-1": "a", "b-0": "b"},
    "report": {
        "hook_point": "h:out", "cache_fingerprint": "f", "config": {},
        "reconstruction": {
            "a-0": {"l0": 31.0, "fvu": 0.1}, "a-1": {"l0": 33.0, "fvu": 0.3},
            "b-0": {"l0": 32.0, "fvu": 0.4}, "PCA": {"l0": 32.0, "fvu": 0.5},
        },
        "firing": {name: {"dead_fraction": 0.25} for name in ("a-0", "a-1", "b-0", "PCA")},
        "substitution": {"intact": {"dictionaries": {"a-0": EFFECT, "a-1": EFFECT}}},
        "downstream": {
            "n_train": 7, "n_test": 5, "n_classes": 2,
            "spliced": dict.fromkeys(("b-0", "as it is", "zero", "mean"), DOWNSTREAM),
        },
    },
    "comparisons": {
        "FVU": [
            {"a": "a", "b": "b", "difference": -0.2, "verdict": "a < b"},
            {"a": "a", "b": "c", "difference": -0.2, "verdict": "tie"},
        ]
    },
}  # fmt: skip


def test_a_row_and_tables_hold_every_seed(tmp_path, monkeypatch, capsys):
    rows_written = []
    monkeypatch.setattr(
        compare_recipes, "append", lambda name, rows: rows_written.append((name, rows))
    )
    (tmp_path / "compare.json").write_text(json.dumps(RECORD))
    arguments = ["x", str(tmp_path / "compare.json"), "--name", "n", "--record"]
    monkeypatch.setattr("sys.argv", arguments)
    compare_recipes.main()
    out = capsys.readouterr().out
    assert "| a | 2 | 32.0 ± 1.4 | 0.2000 ± 0.1414 | 0.2500 ± 0.0000 | 0.5000 ± 0.0000 |" in out
    assert "| b | 1 | 32.0 | 0.4000 | 0.2500 |  |  |  | 0.6250 | 0.7500 |" in out
    assert "| PCA | 1 | 32.0 | 0.5000 | 0.2500 |  |  |  |  |  |" in out
    assert "| a |  | < | = |" in out
    assert "| b | > |  |  |" in out
    [(name, [row])] = rows_written
    assert name == "compare_recipes"
    assert row["figures"]["a"]["FVU"] == [0.1, 0.3]
    assert row["comparisons"] == RECORD["comparisons"]
    assert row["told"]["as it is"] == DOWNSTREAM
    assert row["commit"]


@pytest.mark.parametrize("file", ["smollm2", "dinov2"])
def test_entries_are_the_recipes_of_the_files_of_their_names(repository, file):
    result = load(RunConfig, repository / "configs" / "compare" / f"{file}.yaml").train.saes
    names = {name.rpartition("-")[0] for name in result}
    assert len(result) == 18
    assert len(names) == 6
    for name in names - {"frozen_decoder"}:
        recipe, *_ = load(RunConfig, repository / "configs" / f"{name}.yaml").train.saes.values()
        for seed in range(3):
            entry = result[f"{name}-seed{seed}"]
            assert entry.seed == seed
            assert stripped(entry) == stripped(recipe)


def stripped(entry) -> object:
    """All but sizes, the seed, and what sets the L0."""
    known = entry.matryoshka
    prefixes = known and (known.until, [entry.d_sae // end for end in known.ends])
    l1 = entry.l1 and dataclasses.replace(entry.l1, coefficient=1.0)
    l0 = entry.l0 and dataclasses.replace(entry.l0, coefficient=1.0, target=None)
    changed = dataclasses.replace(entry, seed=None, d_sae=4608, matryoshka=None, l1=l1, l0=l0)
    return changed, prefixes
