"""The steps of a run: one process at a time, and markers that hold what they mark."""

import json
import shutil

import pytest

import sae
from activations_cache import io
from activations_cache.checks import CacheBusyError
from monosema.checks import MonosemaError
from sae.config import ConfigError, dump, load_overrides, to_dict
from sae.run import steps
from sae.run.config import RunConfig, part_of
from sae.run.context import Run
from sae.run.pipeline import MARKER, pending_steps
from tests.tiny import cache_record


@pytest.fixture
def config(tmp_path, tiny_model_dir, tiny_text) -> RunConfig:
    record = {
        "output": str(tmp_path / "run"),
        "cache": cache_record(tiny_model_dir, tiny_text, 1009),
        "train": {
            "batch": 127,
            "precision": "fp32",
            "saes": {"topk": {"d_sae": 31, "activation": {"kind": "topk", "k": 5}}},
        },
    }
    return load_overrides(RunConfig, [], record)


def undone(config: RunConfig, last: str = "train") -> list[str]:
    return [step.name for step in pending_steps(Run(config), last) if not step.is_done]


def test_a_second_run_leaves_in_one_line_and_names_the_first(config, tmp_path):
    lock = tmp_path / "run" / ".run.lock"
    with io.only_one(lock, "another"):
        with pytest.raises(CacheBusyError, match=r"the run in .*run must have one writer"):
            sae.run.job(config, "train")
        assert not (tmp_path / "run" / "run.yaml").exists()
    sae.run.job(config, "train")
    assert (tmp_path / "run" / "run.yaml").read_text() == dump(config)
    with io.only_one(lock, "another"):
        sae.run.job(config, "train")  # all is there: nothing is written
    assert not lock.exists()


def test_a_second_training_leaves_and_the_first_is_unharmed(config, tmp_path):
    sae.run.job(config, "cache")
    with io.only_one(tmp_path / "train" / ".train.lock", "another"):
        with pytest.raises(CacheBusyError, match=r"the training in .*train must have one writer"):
            sae.run.train(tmp_path / "run" / "cache", config.train, out=tmp_path / "train")
        assert not (tmp_path / "train" / "checkpoints").exists()
    sae.run.train(tmp_path / "run" / "cache", config.train, out=tmp_path / "train")
    assert sae.load(tmp_path / "train" / "topk").config.d_sae == 31


def test_a_marker_holds_sizes_and_checksums_of_what_it_marks(config, tmp_path):
    sae.run.job(config, "train")
    path = tmp_path / "run" / "train"
    record = json.loads((path / MARKER).read_text())
    assert {"topk/sae.safetensors", "topk/config.json"} <= record["files"].keys()
    weights = (path / "topk" / "sae.safetensors").read_bytes()
    assert record["files"]["topk/sae.safetensors"] == io.describe(weights)
    assert undone(config) == []
    for damage in (b"", weights[:-1], weights[:-1] + b"x"):
        (path / "topk" / "sae.safetensors").write_bytes(damage)
        assert undone(config) == ["train"]
        sae.run.job(config, "train")
        assert (path / "topk" / "sae.safetensors").read_bytes() == weights


def test_a_marker_of_an_older_version_counts_while_its_results_are_there(config, tmp_path):
    sae.run.job(config, "train")
    marker = tmp_path / "run" / "train" / MARKER
    identity = json.loads(marker.read_text())["identity"]
    marker.write_text(json.dumps({"identity": identity}))
    assert undone(config) == []
    (tmp_path / "run" / "train" / "topk" / "config.json").unlink()
    assert undone(config) == ["train"]
    marker.write_text(json.dumps({"identity": identity, "filds": {}}))
    assert undone(config) == ["train"]


def test_damaged_curves_are_not_taken_for_right_ones(config, tmp_path, caplog):
    sae.run.job(config, "train")
    (logged,) = (tmp_path / "run" / "train" / "logs" / "csv").glob("*/metrics.csv")
    data = logged.read_bytes()
    logged.write_bytes(data.replace(b"1", b"7", 1))
    sae.run.job(config, "train")
    assert f"{logged} is not as it was written" in caplog.text
    assert not logged.exists()
    assert undone(config) == []


LIVE = ["train.source=live", "train.n_rows=2000", "train.buffer_rows=2000", "cache.n_rows=500"]


def test_a_run_trains_from_the_live_model_and_measures_on_its_small_cache(config, tmp_path):
    live = load_overrides(RunConfig, LIVE, to_dict(config))
    result = sae.run.job(live, "evaluate")
    training = len(Run(live).cache.rows(("explain", "score")))
    assert 500 <= training < 700
    provenance = json.loads((result.dictionaries["topk"] / "provenance.json").read_text())
    assert provenance["rows"] == 2000 // 127 * 127
    assert result.report.reconstruction["topk"].fvu < 1
    assert undone(live) == []
    assert undone(config, "cache") == ["cache"]


def test_a_live_run_without_held_out_documents_is_refused_before_anything_runs(config):
    nothing = ["cache.text.explain=0.7", "cache.text.score=0.3", "cache.text.hold=0"]
    rule = r"cache\.text\.hold must be above 0 beside train\.source 'live'.*, got 0"
    with pytest.raises(ConfigError, match=rule):
        load_overrides(RunConfig, [*LIVE, *nothing], to_dict(config))


def test_rules_and_map_of_a_config_are_made_and_no_example_costs_no_page(config, caplog):
    given = ["explain.rules.n_latents=3", "explain.rules.windows.tokens=8", "explain.min_firings=5",
             "explain.rules.min_windows=2", "explain.atlas.plane=pca", "explain.n_baseline=0",
             "evaluate.n_contexts=2", "evaluate.n_contexts_special=1"]  # fmt: skip
    result = sae.run.job(load_overrides(RunConfig, given, to_dict(config)))
    explained = result.output / "explain" / "topk"
    assert json.loads((explained / "rules.json").read_text())["config"]["n_latents"] == 3
    assert json.loads((explained / "atlas.json").read_text())["config"]["plane"] == "pca"
    steering = json.loads((result.output / "steer" / "steering.json").read_text())
    assert steering["shown"] is None
    assert "candidates must have one with AUC" in steering["reason"]
    assert "no steering example" in caplog.text
    assert result.page.is_file()
    assert undone(load_overrides(RunConfig, given, to_dict(config)), "browse") == []


def test_the_parts_of_a_grid_have_each_dictionary_once_and_share_the_cache(config):
    record = to_dict(config)
    record["train"]["saes"]["topk"]["grid"] = {"activation.k": [3, 5, 7, 9, 11]}
    whole = load_overrides(RunConfig, [], record)
    parts = [part_of(whole, f"{number}/2") for number in (1, 2)]
    names = [name for part in parts for name in part.train.saes]
    assert sorted(names) == sorted(whole.train.saes)
    assert [len(part.train.saes) for part in parts] == [3, 2]
    assert {part.cache_path for part in parts} == {f"{whole.output}/cache"}
    assert parts[1].output == f"{whole.output}/part-2-of-2"
    assert part_of(whole, "005/5").train.saes.keys() == {"topk-k11"}
    for wrong in ("0/2", "3/2", "1/6", "1", "one/2", "-1/2"):
        with pytest.raises(MonosemaError, match="--part must be I/N with I from 1 to N and N at"):
            part_of(whole, wrong)


def test_a_killed_explaining_goes_on_with_the_dictionary_that_it_was_in(
    config, tmp_path, monkeypatch
):
    both = ["train.saes.wide.d_sae=47", "train.saes.wide.activation={kind: topk, k: 5}"]
    config = load_overrides(RunConfig, [*both, "explain.null_permutations=19"], to_dict(config))
    sae.run.job(config, "evaluate")
    explained, original = [], steps.explain_texts

    def counted(one, cache, loaded, given, path, **named):
        explained.append(path.name)
        if len(explained) == 2:
            raise KeyboardInterrupt
        return original(one, cache, loaded, given, path, **named)

    monkeypatch.setattr(steps, "explain_texts", counted)
    with pytest.raises(KeyboardInterrupt):
        sae.run.job(config, "explain")
    assert undone(config, "explain") == ["explain"]
    sae.run.job(config, "explain")
    assert explained == ["topk", "wide", "wide"]
    folder = tmp_path / "run" / "explain"

    def made():
        return {f: f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}

    resumed = made()
    for damaged in ("latents.parquet", "files.json"):
        (folder / "topk" / damaged).write_bytes(b"damaged")
        sae.run.job(config, "explain")
        assert explained.pop() == "topk"
        assert len(explained) == 3
        assert made() == resumed
    shutil.rmtree(folder)
    sae.run.job(config, "explain")
    assert explained[3:] == ["topk", "wide"]
    assert made() == resumed
    other = load_overrides(RunConfig, ["explain.null_permutations=20"], to_dict(config))
    sae.run.job(other, "explain")
    assert explained[5:] == ["topk", "wide"]
