"""Transcoders and crosscoders are measured and labelled beside an autoencoder, in one run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sae
from sae.evaluate.report import read_json
from sae.explain.logit_lens import promoted_tokens

OUT, IN, LAST = "model.layers.1.mlp:out", "model.layers.1.mlp:in", "model.layers.2:out"
TOPK = {"d_sae": 67, "activation": {"kind": "topk", "k": 5}}
SAES = {
    "cross": {**TOPK, "inputs": [OUT, LAST]},
    "trans": {**TOPK, "inputs": [IN], "outputs": [OUT], "skip": True, "b_in": "none"},
    "plain": {**TOPK, "inputs": [OUT]},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir, tiny_text) -> Path:
    path = tmp_path_factory.mktemp("places")
    record = {
        "output": str(path / "run"),
        "cache": {
            "model": {"path": str(tiny_model_dir), "dtype": "float32"},
            "text": {
                "sources": [{"path": str(tiny_text), "document_pattern": "CHAPTER"}],
                "context": 31,
            },
            "hook_points": [OUT, IN, LAST],
            "n_rows": 3001,
        },
        "train": {"batch": 127, "epochs": 2, "precision": "fp32", "saes": SAES},
        "evaluate": {"n_contexts": 8, "n_contexts_special": 2},
        "explain": {"min_firings": 5, "min_examples": 2},
    }
    (path / "places.yaml").write_text(json.dumps(record))
    command = [sys.executable, "-m", "sae.cli", "explain", str(path / "places.yaml")]
    subprocess.run(command, check=True, timeout=170)
    return path / "run"


def test_each_is_measured_where_it_reads_and_predicts(run):
    report = read_json(run / "evaluate" / "report.json")
    found = report.reconstruction
    assert found.keys() == SAES.keys()
    assert found["cross"].fvu_per_hook_point.keys() == {OUT, LAST}
    assert all(0 < share < 1 for share in found["cross"].fvu_per_hook_point.values())
    assert report.spliced("trans") is report.spliced("plain")
    assert report.spliced("cross") is report.substitution[f"intact at {OUT} + {LAST}"]


def test_each_is_labelled(run):
    for name in SAES:
        assert json.loads((run / "explain" / name / "summary.json").read_text())["auc"]


def test_the_logit_lens_reads_the_last_place(run):
    cross = sae.load(run / "train" / "cross")
    unembed = torch.randn(31, 23, generator=torch.Generator().manual_seed(0))
    found = promoted_tokens(cross, unembed, None, 3)
    expected = (cross.directions[:, 23:] @ unembed.T).topk(3).indices
    assert torch.equal(found.promoted, expected)


def test_what_was_trained_knows_its_places(run):
    config = sae.load(run / "train" / "trans").config
    assert config.sites("") == ((IN,), (OUT,))
