"""Rules are executed on windows and scored like a language model's labels."""

import json

import pyarrow.parquet as pq
import pytest

from sae.explain.config import ExplainConfig, RuleConfig, WindowConfig
from sae.explain.run import explain
from sae.explain.subject import Subject, score_rules_of

HOOK = "model.layers.3:out"


@pytest.fixture(scope="module")
def scored(planted, identity_dictionary, tmp_path_factory):
    out = tmp_path_factory.mktemp("rules")
    dictionary = identity_dictionary(planted.cache.acts.shape[2])
    subject = Subject(dictionary, planted.cache, HOOK, planted.strings)
    config = ExplainConfig(n_baseline=0, null_permutations=1)
    result = explain(dictionary, planted.cache, HOOK, planted.strings, config, None)
    windows = WindowConfig(tokens=13, n_top=4, pool=101, n_negatives=4, per_bucket=2)
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
