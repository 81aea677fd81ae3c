"""What a training takes on other GPUs: from the config, before anything is begun."""

import json
import sys
from pathlib import Path

import pytest

from activations_cache.testing import synthetic_plan, write_synthetic
from sae.cli import main
from sae.config import load
from sae.run import training_cost
from sae.run.config import RunConfig

TOPK = {"d_sae": 4096, "activation": {"kind": "topk", "k": 5}}


@pytest.fixture
def config(tmp_path, tiny_model_dir, tiny_text) -> Path:
    path = tmp_path / "tiny.yaml"
    record = {
        "output": str(tmp_path / "run"),
        "cache": {
            "model": {"path": str(tiny_model_dir), "dtype": "float32"},
            "text": {"sources": [{"path": str(tiny_text)}], "context": 31},
            "hook_points": ["model.layers.1:out"],
            "n_rows": 4001,
        },
        "train": {"batch": 128, "epochs": 3, "precision": "bf16", "saes": {"topk": TOPK}},
    }
    path.write_text(json.dumps(record))
    return path


def changed(path: Path, **fields) -> RunConfig:
    return load(RunConfig, path, [f"{key}={value}" for key, value in fields.items()])


def sae(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sae", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return int(stop.value.code)


def test_the_hours_are_those_of_all_steps_and_gpus(config):
    cost = training_cost(config, "4xH100")
    assert cost.n_rows == 3 * 4001
    assert cost.seconds == pytest.approx(cost.steps["topk"].total * (12003 // 128))
    assert cost.gpu_hours == pytest.approx(cost.seconds * 4 / 3600)
    assert not (config.parent / "run").exists()


def test_widths_come_from_the_model_s_config_and_then_from_the_cache(config, tiny_model_dir):
    """A cache knows hook points that are wider or narrower than the stream."""
    width = json.loads((tiny_model_dir / "config.json").read_text())["hidden_size"]
    of_model = training_cost(config).memory["topk"].weights
    assert of_model == 4 * 4096 * 2 * width
    plan = synthetic_plan({"model.layers.1:out": 7}, n_examples=31)
    write_synthetic(config.parent / "run" / "cache", plan)
    assert training_cost(config).memory["topk"].weights == 4 * 4096 * 2 * 7


def test_what_does_not_fit_is_said_with_what_to_do(config):
    cost = training_cost(changed(config, **{"train.saes.topk.d_sae": 1 << 30}), "A100")
    assert "they do not fit; lower d_sae or batch" in cost.table.note
    assert cost.memory["topk"].total > 80 << 30
    assert "do not fit" not in training_cost(config, "A100").table.note


def test_the_command_prints_the_same_figures_and_begins_nothing(config, monkeypatch, capsys):
    assert sae(monkeypatch, "train", str(config), "--estimate", "2xA100", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    cost = training_cost(config, "2xA100")
    [row] = shown["tables"][0]["rows"]
    assert row["ms per step"] == f"{1e3 * cost.steps['topk'].total:.2f}"
    assert f"{cost.gpu_hours:,.2f} GPU hours" in shown["lines"][0]
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize(
    ("gpus", "fields", "message"),
    [
        ("3 T4", {}, "must be a number and one of A100"),
        ("0xH200", {}, "must be a number and one of A100"),
        (
            "3xH200",
            {"train.latent_shards": 2},
            "must be a multiple of train.latent_shards=2, got 3",
        ),
        ("H200", {"cache.model.path": "nowhere/at-all"}, "names its width"),
    ],
)
def test_what_cannot_be_estimated_is_refused_in_one_line(
    config, monkeypatch, capsys, gpus, fields, message
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    overrides = [f"{key}={value}" for key, value in fields.items()]
    assert sae(monkeypatch, "train", str(config), *overrides, "--estimate", gpus) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
