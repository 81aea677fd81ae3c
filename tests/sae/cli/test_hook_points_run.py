"""Transcoders and crosscoders are measured and labelled beside an autoencoder, in one run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sae
from sae.evaluate.report import read_json
from sae.explain.config import ExplainConfig
from sae.explain.logit_lens import promoted_tokens
from sae.explain.tables import read_latents
from sae.run.explaining import ExplainRequest, estimate
from sae.run.label_tables import explanation_parts
from tests.tiny import cache_record

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
        "cache": cache_record(
            tiny_model_dir,
            tiny_text,
            3001,
            (
                OUT,
                IN,
                LAST,
            ),
        ),
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
    result = report.reconstruction
    assert result.keys() == SAES.keys()
    assert result["cross"].fvu_per_hook_point.keys() == {OUT, LAST}
    assert all(0 < share < 1 for share in result["cross"].fvu_per_hook_point.values())
    assert report.spliced("trans") is report.spliced("plain")
    assert report.spliced("cross") is report.substitution[f"intact at {OUT} + {LAST}"]


def test_each_is_labelled(run):
    for name in SAES:
        assert json.loads((run / "explain" / name / "summary.json").read_text())["auc"]


def test_the_logit_lens_reads_the_last_place(run):
    cross = sae.load(run / "train" / "cross")
    unembed = torch.randn(31, 23, generator=torch.Generator().manual_seed(0))
    result = promoted_tokens(cross, unembed, None, 3)
    expected = (cross.directions[:, 23:] @ unembed.T).topk(3).indices
    assert torch.equal(result.promoted, expected)


def test_what_was_trained_knows_its_places(run):
    config = sae.load(run / "train" / "trans").config
    assert config.hook_points_or("") == ((IN,), (OUT,))


FEW = ExplainConfig(min_firings=5, min_examples=2)


@pytest.mark.parametrize("name", SAES)
def test_a_dictionary_alone_is_explained_where_it_reads(run, name, tmp_path):
    sae.run.explain(run / "train" / name, run / "cache", FEW, out=tmp_path)
    of_run = read_latents(run / "explain" / name / "latents.parquet")
    assert read_latents(tmp_path / "latents.parquet") == of_run
    record = json.loads((tmp_path / "origin.json").read_text())
    assert record["inputs"] == SAES[name]["inputs"]
    assert record["differs"] == []


def test_dictionaries_alone_are_measured_where_they_read(run):
    report = read_json(run / "evaluate" / "report.json").reconstruction
    for name in SAES:
        measured = sae.run.evaluate({name: run / "train" / name}, run / "cache", model=False)
        assert measured.report.reconstruction[name].fvu == pytest.approx(report[name].fvu, rel=1e-4)


def test_dictionaries_of_two_places_are_measured_apart(run):
    places = [run / "train" / name for name in ("plain", "trans")]
    with pytest.raises(ValueError, match=r"must be of one hook point, got plain of .*1.mlp:out"):
        sae.run.evaluate(places, run / "cache", model=False, baselines=False)


def estimated(path: Path, cache: Path, hook_point: str) -> object:
    return estimate(ExplainRequest(path, cache, hook_point), FEW)


JOBS = {
    "explain": sae.run.explain,
    "evaluate": sae.run.evaluate,
    "compare": lambda path, cache, hook_point: sae.run.compare(
        [path], cache, hook_point=hook_point
    ),
    "estimate": estimated,
}


@pytest.mark.parametrize("job", JOBS)
def test_another_hook_point_is_refused_by_every_job(run, job):
    with pytest.raises(ValueError, match=f"hook point {LAST}, got one of {OUT}; .*force=True"):
        JOBS[job](run / "train" / "plain", run / "cache", hook_point=LAST)


MISTAKES = {
    "another layer": (lambda record: record.update(hook_points=[LAST]), OUT),
    "another side": (lambda record: record.update(hook_points=[IN]), OUT),
    "a block that is not there": (lambda r: r.update(hook_points=["model.layers.9:out"]), None),
    "weights": (lambda record: record["model"].update(model_sha256="0" * 64), None),
    "config": (lambda record: record["model"].update(config_sha256="0" * 64), None),
    "tokenizer": (lambda record: record["model"].update(tokenizer_sha256="0" * 64), None),
    "class": (lambda record: record["model"].update(model="GPT2LMHeadModel"), None),
}
"""What may be wrong with the record of a dictionary, and the hook point that is asked for."""


def test_labels_of_another_origin_are_refused(run, tmp_path, figure):
    for name, (change, hook_point) in MISTAKES.items():
        path = Path(shutil.copytree(run / "train" / "plain", tmp_path / name))
        record = json.loads((path / "provenance.json").read_text())
        change(record)
        (path / "provenance.json").write_text(json.dumps(record))
        config = json.loads((path / "config.json").read_text())
        for point in config.get("inputs") or []:
            point["hook_point"] = record["hook_points"][0]
        (path / "config.json").write_text(json.dumps(config))
        (path / "files.json").unlink()
        before = sorted(path.rglob("*"))
        for given in (path, sae.load(path)):
            with pytest.raises(ValueError, match=r"must be .*, got (one of )?\S+.*; pass"):
                sae.run.explain(given, run / "cache", ExplainConfig(), hook_point=hook_point)
        assert sorted(path.rglob("*")) == before  # no label was written
    figure("R9", f"`explain`: {2 * len(MISTAKES)} of {2 * len(MISTAKES)} wrong origins refused")


def test_a_forced_result_names_what_differs(run, tmp_path):
    path, wrong = run / "train" / "plain", f"hook point: trained on {OUT}, used on {LAST}"
    forced = sae.run.explain(path, run / "cache", FEW, hook_point=LAST, out=tmp_path, force=True)
    assert json.loads((tmp_path / "origin.json").read_text())["differs"] == [wrong]
    assert wrong in explanation_parts("plain", forced)[0].table.note
    measured = sae.run.evaluate([path], run / "cache", hook_point=LAST, model=False, force=True)
    assert measured.differs == {"plain": (wrong,)}
    assert wrong in measured.sections[0].table.note
    assert measured.record["differs"] == {"plain": (wrong,)}


def test_several_hook_points_are_not_moved_by_force(run):
    path = run / "train" / "cross"
    with pytest.raises(ValueError, match=f"hook point {IN}, got one of {OUT}, {LAST}"):
        sae.run.explain(path, run / "cache", FEW, hook_point=IN, force=True)
