import json
import math
from dataclasses import replace

import pytest
import torch

from sae.evaluate import EvaluateConfig, evaluate, read_json, write_json
from sae.evaluate.report import held_out
from sae.run.tables import text_table
from tests.families import make

CONFIG = EvaluateConfig(
    n_contexts=5, n_contexts_special=3, contexts_per_forward=2, n_rows_firing=31, n_resamples=29
)


@pytest.fixture
def evaluation(model, cache, hook_point, identity, random_dictionary):
    both = {"identity": identity, "random": random_dictionary}
    return evaluate(both, cache, hook_point, model, CONFIG)


def test_the_report_has_every_dictionary_in_every_part(evaluation, cache, hook_point):
    report = evaluation.report
    names = {"identity", "random"}
    assert set(report.reconstruction) == set(report.firing) == set(evaluation.firing) == names
    assert set(report.substitution) == {"intact", "spliced"}
    assert set(report.substitution["spliced"].dictionaries) == names
    assert report.substitution["intact"].n_contexts == 5
    assert report.substitution["spliced"].n_contexts == 3
    assert report.cache_fingerprint == cache.fingerprint
    assert report.hook_point == hook_point
    assert report.skip_positions == 1
    assert report.reconstruction["random"].n_rows == 8 * 12
    assert report.firing["random"].n_rows == 8 * 12 + 31
    assert report.config["n_contexts"] == 5


def test_a_report_survives_the_disk(evaluation, tmp_path):
    write_json(evaluation.report, tmp_path / "report.json")
    assert read_json(tmp_path / "report.json") == evaluation.report


def test_nan_is_null_in_json_and_nan_again_when_read(evaluation, tmp_path):
    report = evaluation.report
    undefined = replace(report.reconstruction["random"], fvu=math.nan)
    report = replace(report, reconstruction={"random": undefined})
    write_json(report, tmp_path / "report.json")
    record = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert record["reconstruction"]["random"]["fvu"] is None
    assert math.isnan(read_json(tmp_path / "report.json").reconstruction["random"].fvu)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"reconstruction": {"a": 3}}'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=r"report\.json must be a report of `sae evaluate`"):
        read_json(tmp_path / "report.json")


def test_contexts_and_rows_are_held_out_ones(cache, hook_point, tokens):
    context = held_out(cache, hook_point, CONFIG)
    hold = {tuple(t.tolist()) for t, s in zip(tokens, cache.examples.split, strict=True) if s == 2}
    assert {tuple(t.tolist()) for t in context.tokens} <= hold
    assert len(context.tokens) == 5
    assert torch.equal(context.mean, cache[hook_point].mean)


def test_firing_is_counted_in_held_out_and_some_training_rows(
    model, cache, hook_point, random_dictionary
):
    every = replace(CONFIG, n_rows_firing=10_000)
    result = evaluate({"a": random_dictionary}, cache, hook_point, model, every).firing["a"]
    dense = random_dictionary.encode_dense(cache[hook_point][cache.rows()])
    assert torch.equal(result.n_fired, (dense != 0).sum(0))
    none = replace(CONFIG, n_rows_firing=0)
    result = evaluate({"a": random_dictionary}, cache, hook_point, model, none).firing["a"]
    dense = random_dictionary.encode_dense(cache[hook_point][cache.rows(("hold",))])
    assert torch.equal(result.n_fired, (dense != 0).sum(0))


def test_the_seed_chooses_the_contexts(cache, hook_point):
    first, again = (held_out(cache, hook_point, CONFIG).tokens for _ in range(2))
    other = held_out(cache, hook_point, replace(CONFIG, seed=1)).tokens
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_gradients_are_not_kept(evaluation):
    assert not evaluation.firing["random"].max_activation.requires_grad


def test_a_masked_model_without_a_mask_token_has_no_loss(cache, hook_point, identity):
    report = evaluate({"identity": identity}, cache, hook_point, make("Bert"), CONFIG).report
    assert report.substitution == {}
    table = text_table(report)
    assert table.columns == ("dictionary", "L0", "FVU", "dead")
    assert [len(row) for row in table.rows] == [4]
    assert table.note.endswith("it predicts neither the next token nor masked ones")


def test_a_masked_models_table_says_that_its_tokens_are_masked(evaluation, tmp_path):
    report = evaluation.report
    assert text_table(report).note.endswith("held-out tokens, positions below 1 left intact")
    of_masked = {k: replace(s, loss="masked token") for k, s in report.substitution.items()}
    report = replace(report, substitution=of_masked)
    assert "held-out masked tokens, positions" in text_table(report).note
    write_json(report, tmp_path / "report.json")
    assert read_json(tmp_path / "report.json") == report


def test_documents_that_share_a_context_are_spliced_one_by_one(cache, hook_point, monkeypatch):
    whole = held_out(cache, hook_point, CONFIG)
    segment = torch.zeros_like(cache.examples.tokens)
    segment[:, 5:] = 1
    segmented = replace(cache.examples, segment=segment)
    monkeypatch.setattr(type(cache), "examples", property(lambda _: segmented))
    result = held_out(cache, hook_point, CONFIG)
    assert len(result.tokens) == 2 * len(whole.tokens)
    assert torch.equal(result.tokens[0, :5], whole.tokens[0, :5])
    assert (result.tokens[0, 5:] == -1).all()
    n = whole.tokens.shape[1] - 5
    assert torch.equal(result.tokens[1, :n], whole.tokens[0, 5:])
