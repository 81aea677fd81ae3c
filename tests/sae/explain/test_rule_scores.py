"""Rules are executed on windows and scored like a language model's labels."""

import json
from dataclasses import fields

import numpy as np
import pyarrow.parquet as pq
import pytest

from sae.explain.config import ExplainConfig, RuleConfig, WindowConfig
from sae.explain.run import TextUnits, explain
from sae.explain.subject import Subject, by_level, score_rules_of
from sae.explain.tables import LatentRecord

HOOK = "model.layers.3:out"


@pytest.fixture(scope="module")
def scored(planted, identity_dictionary, tmp_path_factory):
    out = tmp_path_factory.mktemp("rules")
    dictionary = identity_dictionary(planted.cache.acts.shape[2])
    subject = Subject(dictionary, planted.cache, HOOK, planted.strings)
    config = ExplainConfig(n_baseline=0, null_permutations=1)
    result = explain(dictionary, TextUnits(planted.cache, HOOK, config, planted.strings), None)
    windows = WindowConfig(tokens=13, n_top=4, pool=101, n_negatives=4, per_step=2)
    rules = RuleConfig(windows=windows, min_windows=4)
    return score_rules_of(subject, result.labels, result.names, rules, out), out, subject, rules


def test_planted_words_are_detected_and_controls_are_not(planted, scored):
    summary, out, *_ = scored
    assert list(summary)[:4] == ["n_failed", "failed_by_reason", "n_open", "n_insufficient"]
    assert summary["n_failed"] == 0
    assert summary["n_done"] >= planted.n_topics
    right = summary["scores"]["detection"]
    assert right["mean"] > 0.7
    for control in ("another's label", "shuffled windows"):
        assert summary["controls"][control]["detection"]["mean"] < right["mean"] - 0.15
    assert set(summary["scores"]) == {"detection", "fuzzing", "simulation", "rubric", "intruder"}
    table = pq.read_table(out / "rules.parquet").to_pylist()
    lines = [json.loads(line) for line in (out / "rules.jsonl").read_text().splitlines()]
    assert [row["latent"] for row in table] == [line["latent"] for line in lines]
    assert {row["method"] for row in table if row["status"] == "done"} == {"corpus rule/1"}
    assert (out / "windows.parquet").is_file()


def test_windows_are_collected_once_for_all_who_need_them(planted, scored):
    _, out, subject, rules = scored
    n_read = len(planted.cache.read_ids)
    again = subject.collected(rules.windows, out)
    assert again is subject.collected(rules.windows, out)
    assert len(planted.cache.read_ids) == n_read


def latent_record(latent: int, curve: tuple, curve_n: tuple, base: float) -> LatentRecord:
    numbers = dict.fromkeys(("n_fired_explain", "n_fired_score"), 0)
    reals = dict.fromkeys(("density", "max_activation"), 0.0)
    lists = ("words", "weights", "joint", "information", "npmi", "histogram")
    plain = {field.name: None for field in fields(LatentRecord)} | numbers | reals
    plain |= {"label": "", "kind": "", **dict.fromkeys(lists, ())}
    known = {"latent": latent, "status": "scored", "curve": curve, "curve_n": curve_n, "base": base}
    return LatentRecord(**(plain | known))


def test_figures_by_level_are_those_of_the_files(tmp_path):
    """Sensitivity: firings with a label's word from a fifth on, over the rows with one."""
    latents = [latent_record(0, (0.5, None, 1.0, None, 1.0), (4, 0, 3, 0, 1), 0.1),
               latent_record(1, (0.0, 0.0, 0.0, 0.0, 1.0), (9, 1, 1, 1, 3), 0.06)]  # fmt: skip
    summary = {"curve": [0.1] * 5, "base": 0.02, "n_rows_score": 100}
    grades = {"level 0": 0.0, "level 4": 3.0}
    rubric = {"scorer": "rubric", "value": 0.5, "details": grades}
    other = {"scorer": "rubric", "value": 0.1, "details": {"level 4": 0.6}}
    lines = [{"scores": [rubric], "controls": {"another's label": [other]}},
             {"scores": [], "controls": {}}]  # fmt: skip
    (tmp_path / "rules.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    found = by_level(tmp_path, summary, latents)
    first, second = np.array([6, 4, 4, 1, 1]) / 10, np.array([3, 3, 3, 3, 3]) / 6
    assert found["sensitivity"] == pytest.approx(((first + second) / 2).tolist())
    assert found["rubric"] == [0.0, None, None, None, 1.0]
    assert found["rubric_of_another_label"] == pytest.approx([None] * 4 + [0.2])
    assert (found["judge"], found["sensitivity_by_judge"]) == ("executed rules", None)
    asked = [{"scorer": "sensitivity", "value": 0.8, "details": {}}]
    (tmp_path / "explanations.jsonl").write_text(json.dumps({"scores": asked, "controls": {}}))
    with_model = by_level(tmp_path, summary, latents)
    assert with_model == found | {"sensitivity_by_judge": 0.8}  # it was not asked for grades
    graded = [{"scorer": "rubric", "value": 1.0, "details": {"level 2": 1.5}}]
    (tmp_path / "explanations.jsonl").write_text(json.dumps({"scores": graded, "controls": {}}))
    assert by_level(tmp_path, summary, latents)["judge"] == "a language model"
