"""A study of three widths on the tiny model: what it finds, and that it goes on where it was."""

import json
import logging
from itertools import pairwise

import pytest
from typer.testing import CliRunner

import sae
from sae.cli.main import app
from sae.config import ConfigError, dump, load_overrides, to_dict
from sae.explain.tables import read_latents
from sae.neighbours import nearest, splitting
from sae.run.config import RunConfig
from sae.run.context import Run
from sae.run.label_tables import study_panels, study_sections
from sae.run.pipeline import pending_steps
from sae.run.widths import STUDY, studied, widths_of
from tests.tiny import cache_record, sentences


def record_of(path, model, text) -> dict:
    """Three widths, two with frozen twins; families of four texts with controls."""
    texts = sentences(16, seed=5)
    families = [
        {"family": name, "safety": name == "danger", "words": {name: texts[i].lower().split()[:3]},
         "pos": texts[8 * i : 8 * i + 4], "neg": texts[8 * i + 4 : 8 * i + 8]}
        for i, name in enumerate(("danger", "plain"))
    ]  # fmt: skip
    file = path / "families.json"
    file.write_text(json.dumps(families))
    entry = {
        "d_sae": 13, "activation": {"kind": "topk", "k": 3},
        "dead_after_tokens": 404, "grid": {"d_sae": [13, 23, 37]},
    }  # fmt: skip
    twin = {**entry, "frozen": "decoder", "grid": {"d_sae": [13, 23]}}
    windows = {"tokens": 8, "pool": 16, "n_top": 4, "per_step": 1, "n_negatives": 1}
    return {
        "output": str(path / "study"),
        "title": "three widths",
        "cache": cache_record(model, text, 1511),
        "train": {
            "batch": 127,
            "precision": "fp32",
            "saes": {"topk": entry, "frozen": twin},
        },
        "evaluate": {"n_contexts": 2, "n_contexts_special": 1},
        "explain": {
            "min_firings": 5, "n_baseline": 0, "null_permutations": 1, "permutations": 2,
            "kinds": ["word"], "top_contexts": 1, "contexts_per_fifth": 0,
            "rules": {"n_latents": 5, "min_windows": 2, "scorers": ["rubric"], "windows": windows},
            "atlas": {"plane": "pca", "n_rows": 512},
        },
        "study": {"families": str(file), "exchanges": 19, "trees": 3, "resamples": 20},
    }  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model_dir, tiny_text) -> RunConfig:
    record = record_of(tmp_path_factory.mktemp("study"), tiny_model_dir, tiny_text)
    return load_overrides(RunConfig, [], record)


@pytest.fixture(scope="module")
def done(config):
    return sae.run.study(config)


def test_every_width_stands_beside_its_twin_in_one_table(done):
    names = ["topk-d_sae13", "topk-d_sae23", "topk-d_sae37"]
    assert [row[0] for row in done.sections[0].table.rows] == names
    for name in names:
        null = done.record["completeness"][name]["null"]
        twin = done.record["completeness"].get(name.replace("topk", "frozen"))
        assert null["of"].startswith("the frozen random decoder" if twin else "random directions")
        assert twin is None or (null["points"] == twin["points"] and "null" not in twin)
        neurons = done.record["neurons"][name]
        assert neurons["hook_points"] == [f"model.layers.{i}.mlp.down_proj:in" for i in range(2)]
        assert 0 < neurons["median"] <= 1
        assert len(done.record["levels"][name]["specificity"]) == 5
    runs = done.record["scaling"]["runs"]
    assert len(runs) == 9
    assert {run["d_sae"] for run in runs} == {13, 23, 37}
    assert len({run["rows"] for run in runs}) == 3
    assert "exponent of F*" in done.record["scaling"]["figures"]


def test_widths_of_one_seed_would_begin_with_the_same_directions(config, done):
    """Then half of the wider's latents would descend from the narrower's without any training."""
    saes = studied(config).train.saes
    assert {name: entry.seed for name, entry in saes.items()} == {
        "topk-d_sae13": 0, "topk-d_sae23": 1, "topk-d_sae37": 2,
        "frozen-d_sae13": 0, "frozen-d_sae23": 1,
    }  # fmt: skip
    twins = Run(studied(config)).dictionaries
    narrow, wide = (twins[f"frozen-d_sae{n}"].dec_rows.detach().float() for n in (13, 23))
    assert float(nearest(narrow, wide, 1).cosine.max()) < 0.99
    given = load_overrides(RunConfig, ["train.seed=7"], to_dict(config))
    assert studied(given).train.saes["topk-d_sae37"].seed == 9


def test_trees_are_the_splitting_of_the_trained_directions(done, config):
    run = Run(studied(config))
    rows = [run.dictionaries[w.name].dec_rows.detach().float() for w in widths_of(run.config)]
    parents = [splitting(a, b).parent for a, b in pairwise(rows)]
    labels = [read_latents(run.path("explain") / w.name) for w in widths_of(run.config)]
    assert len(done.record["trees"]) == 3
    for tree in done.record["trees"]:
        assert tree["label"] == labels[0][tree["latent"]].label
        children = [child["latent"] for child in tree["children"]]
        assert children == (parents[0] == tree["latent"]).nonzero().flatten().tolist()
        for child in tree["children"]:
            below = [one["latent"] for one in child["children"]]
            assert below == (parents[1] == child["latent"]).nonzero().flatten().tolist()
        itself = tree["near"]["topk-d_sae13"][0]
        assert (itself[0], round(itself[1], 4)) == (tree["latent"], 1.0)


def test_families_are_searched_with_controls_and_a_caution(done):
    for entry in done.record["search"].values():
        for found in entry["found"].values():
            assert 1 / 20 <= found["p"] <= 1
            assert 0 <= found["auc"] <= 1
    shown = {section.title: section.table for section in done.sections}
    assert "says nothing about what the model does" in shown["families"].note
    assert {row[0] for row in shown["families"].rows} == {"danger (safety)", "plain"}


def test_the_report_is_one_page_with_pictures(done):
    page = done.page.read_text()
    assert page.count("data:image/png;base64") == 3  # completeness, levels, scaling law
    for section in done.sections:
        assert f"<h2>{section.title}</h2>" in page
    assert [s.title for s in study_sections(done.record)] == [s.title for s in done.sections]
    assert len(study_panels(done.record)["completeness"][0].lines) == 6


def test_a_study_goes_on_where_it_was_killed(done, config, caplog):
    run = Run(studied(config))
    left = [step.name for step in pending_steps(run, "study", STUDY) if not step.is_done]
    assert left == []
    (run.path("map") / "done.json").unlink()
    before = (run.path("scaling") / "done.json").stat().st_mtime_ns
    with caplog.at_level(logging.WARNING):
        assert sae.run.study(config).record == done.record
    assert (run.path("scaling") / "done.json").stat().st_mtime_ns == before


def test_the_command_shows_the_same_numbers(done, config, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(dump(config))
    shown = CliRunner().invoke(app, ["study", str(file), "--json"])
    assert shown.exit_code == 0, shown.output
    result = json.loads(shown.stdout)
    assert result["data"] == done.record
    (table,) = result["tables"]
    assert [tuple(row.values()) for row in table["rows"]] == list(done.sections[0].table.rows)
    assert result["lines"][-1] == f"page: {done.page}"


def test_what_is_no_study_is_refused_in_one_line(config, monkeypatch):
    record = to_dict(config)
    one = dict(list(record["train"]["saes"].items())[:1])
    record["train"] = {**record["train"], "saes": one}
    single = load_overrides(RunConfig, [], record)
    with pytest.raises(ConfigError, match=r"one trained dictionary of each of several widths"):
        sae.run.study(single)
    with monkeypatch.context() as launched:
        launched.setenv("RANK", "0")
        launched.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="sae study must run as one process, got 2"):
            sae.run.study(config)
    with pytest.raises(ConfigError, match=r"study must be absent for `sae run`, got one"):
        sae.run.job(config)
    with pytest.raises(ConfigError, match=r"passes must lie above 0 and below 1, got 1\.5"):
        load_overrides(RunConfig, ["study.passes=[1.5]"], to_dict(config))
