"""Labels by a language model for a whole dictionary: files, controls, replay, budget, export."""

import dataclasses
import gzip
import json

import pyarrow.parquet as pq
import pytest
import torch

from sae.baselines import baseline_dictionary
from sae.explain.autointerp import label_with_llm
from sae.explain.config import AutointerpConfig, LLMConfig, WindowConfig
from sae.explain.llm.chat import ConstantClient, ReplayMissError, UnavailableError, UnfinishedError
from sae.explain.subject import Subject
from sae.explain.windows import WordRule
from tests.clients import OracleClient, RandomClient, ScriptedClient

HOOK = "model.layers.3:out"
CONFIG = AutointerpConfig(
    llm=LLMConfig(model="m", attempts=1),
    windows=WindowConfig(tokens=13, n_top=4, pool=101, n_negatives=4, per_step=2),
    scorers=("detection",), latents=(0, 3, 17, 18, 19), min_windows=4, n_controls=2, n_baseline=0,
)  # fmt: skip
FILES = ("explanations.jsonl", "explanations.parquet", "explanations.json")


@pytest.fixture(scope="module")
def subject(planted, identity_dictionary):
    dictionary = identity_dictionary(planted.cache.acts.shape[2])
    return Subject(dictionary, planted.cache, HOOK, planted.strings)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in (path / FILES[0]).read_text().splitlines()]


def test_every_latent_has_a_status_and_failures_come_first(subject, tmp_path):
    summary = label_with_llm(subject, CONFIG, tmp_path, RandomClient(1))
    records = lines(tmp_path)
    assert [r["latent"] for r in records] == [0, 3, 17, 18, 19]
    assert [r["status"] for r in records] == ["done"] * 3 + ["insufficient"] * 2
    assert records[3]["reason"] == "0 active windows of 4 wanted"
    written = json.loads((tmp_path / FILES[2]).read_text())
    assert next(iter(written)) == "n_failed"
    assert written == json.loads(json.dumps(summary))
    assert (written["n_failed"], written["n_insufficient"], written["n_done"]) == (0, 2, 3)
    assert set(written["controls"]) == {"another's label", "shuffled windows"}
    assert written["scores"]["detection"]["floor"] == 0.5
    table = pq.read_table(tmp_path / FILES[1]).to_pylist()
    assert [row["label"] for row in table[:3]] == [r["explanation"]["text"] for r in records[:3]]
    assert {s["control"] for row in table for s in row["scores"]} == {
        "", "another's label", "shuffled windows",
    }  # fmt: skip
    assert table[0]["scores"][0]["value"] == records[0]["scores"][0]["value"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_second_run_pays_nothing_and_replay_gives_the_same_bytes(subject, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    summary = label_with_llm(subject, CONFIG, first, RandomClient(1))
    assert summary["cost"]["requests"] > 0
    silent = ScriptedClient([AssertionError("must not be called")], name=RandomClient(1).name)
    llm = LLMConfig(
        model="m", attempts=1, cache_mode="replay", cache_path=str(first / "llm.sqlite")
    )
    replaying = dataclasses.replace(CONFIG, llm=llm)
    again = label_with_llm(subject, replaying, second, silent)
    assert again["cost"]["requests"] == 0
    assert again["cost"]["cached"] == summary["cost"]["requests"]
    for name in FILES[:2]:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    third = label_with_llm(subject, replaying, tmp_path / "third", silent)
    assert third == again
    assert (second / FILES[2]).read_bytes() == (tmp_path / "third" / FILES[2]).read_bytes()
    with pytest.raises(ReplayMissError):
        label_with_llm(subject, replaying, tmp_path / "fourth", RandomClient(2))
    assert not (tmp_path / "fourth" / FILES[2]).exists()


def test_the_oracle_of_one_topic_scores_high_on_that_latent_alone(subject, planted, tmp_path):
    rule = WordRule(dict.fromkeys(planted.words[0], 1.0))
    config = dataclasses.replace(CONFIG, latents=(0, 1, 2), n_controls=0)
    label_with_llm(subject, config, tmp_path, OracleClient(rule, "words of topic 0"))
    label_score, *others = [record["scores"][0] for record in lines(tmp_path)]
    assert (
        label_score["value"] > 0.65
    )  # the latent misses its words now and then, and fires beside them
    assert max(other["value"] for other in others) < label_score["value"] - 0.1
    assert label_score["floor"] == 0.5


def test_baselines_are_explained_beside_the_latents(subject, tmp_path):
    config = dataclasses.replace(CONFIG, n_baseline=3, n_controls=0)
    summary = label_with_llm(subject, config, tmp_path, ConstantClient(1))
    assert set(summary["baselines"]) == {"random directions", "raw neurons"}
    for result in summary["baselines"].values():
        assert result["n_done"] + result["n_insufficient"] == 3
    assert summary["scores"]["detection"]["mean"] == 0.5


def test_without_money_nothing_is_called_and_everything_is_counted(subject, tmp_path):
    llm = LLMConfig(model="m", max_usd=0.0, usd_per_million_output=1.0)
    silent = ScriptedClient([AssertionError("must not be called")])
    summary = label_with_llm(subject, dataclasses.replace(CONFIG, llm=llm), tmp_path, silent)
    assert (summary["n_failed"], summary["failed_by_reason"]) == (3, {"budget": 3})
    assert summary["cost"]["requests"] == 0
    assert summary["scores"] == {}  # missing, not a number
    assert {r["reason"] for r in lines(tmp_path)[:3]} == {"budget: max_usd=0.0 would be exceeded"}


def test_what_can_be_asked_again_ends_in_an_error_and_a_second_run_asks_just_that(
    subject, tmp_path
):
    class Recording(RandomClient):
        def __init__(self, fails=False):
            super().__init__(1)
            self.n, self.fails, self.answered = 0, fails, []

        async def complete(self, request):
            self.n += 1
            if self.fails and request.messages[-1].content.count("topic") and self.n % 3 == 0:
                raise UnavailableError("transport", "connection reset")
            self.answered.append(request)
            return await super().complete(request)

    llm = LLMConfig(model="m", attempts=1, retries=0, concurrency=1)
    config, client = dataclasses.replace(CONFIG, llm=llm), Recording(fails=True)
    with pytest.raises(UnfinishedError) as error:
        label_with_llm(subject, config, tmp_path, client)
    assert "(transport: connection reset); run the same command again" in str(error.value)
    assert "\n" not in str(error.value)
    summary = json.loads((tmp_path / FILES[2]).read_text())
    lost = summary["questions_lost"]["transport"]
    assert f"got {lost} without one of " in str(error.value)
    assert summary["first_words"] == {"transport": "connection reset"}
    assert summary["n_open"] == sum(bool(r["lost"]) for r in lines(tmp_path)) > 0
    second, alone = Recording(), Recording()
    again = label_with_llm(subject, config, tmp_path, second)
    assert (again["n_open"], again["questions_lost"], again["n_done"]) == (0, {}, 3)
    label_with_llm(subject, config, tmp_path / "whole", alone)
    assert len(second.answered) == len({*second.answered})
    assert {*second.answered} == {*alone.answered} - {*client.answered}  # no more and no less
    assert (tmp_path / FILES[0]).read_bytes() == (tmp_path / "whole" / FILES[0]).read_bytes()


def test_neuronpedias_files(subject, tmp_path):
    config = dataclasses.replace(CONFIG, neuronpedia_model="smollm2", neuronpedia_layer="15-res")
    promoted = [([f"up{i}"], [f"down{i}"]) for i in range(20)]
    label_with_llm(subject, config, tmp_path, ConstantClient(1), promoted=promoted)
    results = {}
    for name in ("explanations", "features", "activations"):
        path = tmp_path / "neuronpedia" / "smollm2" / "15-res" / name / "batch-0.jsonl.gz"
        rows = gzip.decompress(path.read_bytes()).decode().splitlines()
        results[name] = [json.loads(row) for row in rows]
    assert results["explanations"][0] == {
        "modelId": "smollm2", "layer": "15-res", "index": "0", "description": "something",
        "typeName": "explain-levels/1", "explanationModelName": "something",
    }  # fmt: skip
    assert [f["index"] for f in results["features"]] == ["0", "3", "17", "18", "19"]
    assert results["features"][1]["pos_str"] == ["up3"]
    for window in results["activations"]:
        assert len(window["tokens"]) == len(window["values"])
        assert window["values"][window["maxValueTokenIndex"]] == window["maxValue"]


def test_an_unknown_latent_is_refused(subject, tmp_path):
    config = dataclasses.replace(CONFIG, latents=(0, 99))
    with pytest.raises(ValueError, match="latents must be below d_sae=20, got 99"):
        label_with_llm(subject, config, tmp_path, ConstantClient())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_latents": 0}, "n_latents must be at least 1, got 0"),
        ({"scorers": ()}, "scorers must be one or more scorers"),
        ({"latents": (3, 3)}, "latents must be numbers of latents, each once"),
        ({"neuronpedia_model": "../x"}, "neuronpedia_model must be letters"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        AutointerpConfig(**({"llm": LLMConfig(model="m")} | wrong))


def test_baselines_are_as_dense_as_asked():
    rows = torch.randn(4001, 11, generator=torch.Generator().manual_seed(0)) * 3 + 5
    dictionary = baseline_dictionary(rows, 13, 0.05, seed=1)
    fires = (dictionary.encode_dense(rows) > 0).float().mean(0)
    assert fires.tolist() == pytest.approx([0.05] * 26, abs=0.003)
    neurons = dictionary.enc_rows[13:]
    assert (neurons.abs().amax(1) == 1).all()
    assert (neurons.abs().sum(1) == 1).all()
    with pytest.raises(ValueError, match="density must lie between 0 and 1, got 0"):
        baseline_dictionary(rows, 2, 0.0, seed=1)
