"""Every kind of dictionary goes through the whole job: cache, training, ..., page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sae
from sae.cli import main
from sae.evaluate.report import read_json
from sae.explain import read_latents

KINDS = {
    "relu": {"activation": {"kind": "relu"}, "l1": {"coefficient": 0.3}, "unit_norm": False},
    "topk": {"activation": {"kind": "topk", "k": 5}},
    "batchtopk": {"activation": {"kind": "batchtopk", "k": 5}},
    "jumprelu": {
        "activation": {"kind": "jumprelu"},
        "l0": {"coefficient": 3.0, "target": 5.0, "threshold_lr": 0.03},
    },
    "groupmax": {"d_sae": 65, "activation": {"kind": "groupmax", "k": 5}},
    "gated": {"activation": {"kind": "gated"}, "l1": {"coefficient": 0.3}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir, tiny_text, tiny_records) -> Path:
    path = tmp_path_factory.mktemp("kinds")
    record = {
        "output": str(path / "run"),
        "cache": {
            "model": {"path": str(tiny_model_dir), "dtype": "float32"},
            "text": {
                "sources": [
                    {"path": str(tiny_text), "document_pattern": "CHAPTER"},
                    {"path": str(tiny_records), "field": "gloss", "label": "kind"},
                ],
                "context": 31,
                "attention": "document",
            },
            "hook_points": ["model.layers.1:out"],
            "n_rows": 3001,
        },
        "train": {
            "batch": 127,
            "epochs": 3,
            "precision": "fp32",
            "saes": {name: {"d_sae": 67, **entry} for name, entry in KINDS.items()},
        },
        "evaluate": {"n_contexts": 8, "n_contexts_special": 2},
        "explain": {"min_firings": 5, "min_examples": 2},
        "steer": {"max_new_tokens": 5, "n_candidates": 3},
    }
    (path / "kinds.yaml").write_text(json.dumps(record))
    command = [sys.executable, "-m", "sae.cli", "explain", str(path / "kinds.yaml")]
    subprocess.run(command, check=True, timeout=170)
    return path / "run"


def test_each_is_measured(run):
    result = read_json(run / "evaluate" / "report.json").reconstruction
    assert result.keys() == KINDS.keys()
    assert all(0 < measured.fvu < 1 and measured.l0 > 0 for measured in result.values())


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_labelled_and_loaded(run, kind):
    assert json.loads((run / "explain" / kind / "summary.json").read_text())["auc"]
    assert sae.load(run / "train" / kind).config.activation.kind == kind


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu", "gated"])
def test_each_steers(run, kind, monkeypatch):
    latent = labelled(run, kind)
    command(monkeypatch, "steer", run, kind, latent)
    shown = json.loads((run / "steer" / "steering.json").read_text())["shown"]
    assert (shown["dictionary"], shown["latent"]) == (kind, latent)


def test_each_has_its_pages(run, monkeypatch):
    command(monkeypatch, "run", run, "gated", labelled(run, "gated"))
    for number in range(len(KINDS)):
        pages = run / "browse" / "data" / f"d{number}" / "latents" / "0.js"
        assert pages.stat().st_size > 20_000


def command(monkeypatch, name: str, run: Path, kind: str, latent: int) -> None:
    """A command on the run's config that steers by one latent."""
    overrides = [f"steer.dictionary={kind}", f"steer.latent={latent}", "steer.strength=2.0"]
    monkeypatch.setattr(sys, "argv", ["sae", name, str(run.parent / "kinds.yaml"), *overrides])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert not stop.value.code


def labelled(run: Path, kind: str) -> int:
    records = read_latents(run / "explain" / kind / "latents.parquet")
    return next(record.latent for record in records if record.status == "scored")
