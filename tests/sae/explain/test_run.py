"""From a cache to labels, scores and files."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sae.explain import tables
from sae.explain.config import ExplainConfig
from sae.explain.examples import Context
from sae.explain.run import TextUnits, explain
from sae.explain.tables import read_examples, read_latents

CONFIG = ExplainConfig(top_contexts=3, context_tokens=17)


@pytest.fixture(scope="module")
def finished(planted, request, tmp_path_factory):
    """One run on the planted cache; several tests look at it."""
    out = tmp_path_factory.mktemp("explained")
    return _run(planted, out), out


def _run(planted, out: Path | None, config: ExplainConfig = CONFIG, progress=None):
    from sae.architecture import ReLU, SAEConfig
    from sae.autoencoder import SparseAutoencoder

    d_sae = planted.cache.acts.shape[2]
    dictionary = SparseAutoencoder(
        SAEConfig(d_in=d_sae, d_sae=d_sae, activation=ReLU(), b_in="none")
    )
    with torch.no_grad():
        dictionary.enc_rows.copy_(torch.eye(d_sae))
    texts = TextUnits(planted.cache, "model.layers.3:out", config, planted.strings)
    return explain(dictionary, texts, out, progress=progress)


def test_planted_latents_are_labelled_and_score_well(planted, finished):
    explained, _ = finished
    topics = slice(0, planted.n_topics)
    assert set(explained.status[topics]) == {"scored"}
    for topic in range(planted.n_topics):
        assert set(explained.labels.words(topic, explained.names)[:3]) == planted.words[topic]
    assert (explained.scores.low[topics] > 0.6).all()
    assert explained.summary.auc.mean > 0.7
    assert explained.summary.auc.low < explained.summary.auc.mean < explained.summary.auc.high


def test_a_latent_that_knows_nothing_is_scored_at_chance(planted, finished):
    explained, _ = finished
    scores = explained.scores
    assert explained.status[planted.random] == "scored"
    assert scores.low[planted.random] <= 0.5 <= scores.high[planted.random]
    assert explained.labels.p_value[planted.random] > 0.05


def test_control_labels_score_at_chance(planted, finished):
    explained, _ = finished
    control = explained.summary.control_auc
    assert control.mean == pytest.approx(0.5, abs=0.03)
    assert np.isfinite(explained.control.auc).sum() == explained.summary.n_scored
    assert (explained.control.auc != explained.scores.auc)[: planted.n_topics].all()


def test_every_latent_is_counted_once(planted, finished):
    explained, _ = finished
    summary = explained.summary
    assert explained.status[planted.silent] == "dead"
    assert explained.status[planted.rare] == "insufficient"
    assert (summary.n_scored, summary.n_insufficient, summary.n_dead) == (18, 1, 1)
    assert summary.n_latents == 20
    auc = explained.scores.auc
    assert summary.auc.mean == pytest.approx(np.nanmean(auc))
    assert summary.auc_all_live == pytest.approx((np.nansum(auc) + 0.5) / 19)
    assert summary.auc_median == pytest.approx(np.nanmedian(auc))
    assert summary.floor == 0.5
    assert 17 / 18 <= summary.share_above_chance <= 1.0


def test_labels_and_scores_share_no_example(planted, fake_cache):
    """What is only in the score split leaves the labels as they are, and the other way round."""
    cache = planted.cache
    base = _run(planted, None)
    changed = {}
    for name, split in (("explain", 0), ("score", 1)):
        acts = cache.acts.clone()
        acts[cache.split == split] = acts[cache.split == split].flip(0)
        copy = fake_cache(cache.tokens, acts, cache.split, cache.source)
        changed[name] = _run(_with_cache(planted, copy), None)
    assert (changed["score"].labels.rules.value == base.labels.rules.value).all()
    assert (changed["score"].labels.rules.weight == base.labels.rules.weight).all()
    assert not np.array_equal(changed["score"].scores.auc, base.scores.auc, equal_nan=True)
    assert not (changed["explain"].labels.rules.value == base.labels.rules.value).all()
    read = [set(cache.refs(cache.rows((name,))).example.tolist()) for name in ("explain", "score")]
    assert read[0]
    assert read[1]
    assert not read[0] & read[1]


def _with_cache(planted, cache):
    import dataclasses

    return dataclasses.replace(planted, cache=cache)


def test_hold_rows_are_never_read(planted, fake_cache):
    cache = planted.cache
    split = cache.split.clone()
    split[::7] = 2
    copy = fake_cache(cache.tokens, cache.acts, split, cache.source)
    _run(_with_cache(planted, copy), None)
    assert set(copy.read_ids) == set(copy.rows(("explain", "score")).tolist())


def test_splits_that_share_an_example_are_refused(planted, monkeypatch):
    rows = planted.cache.rows(("explain", "score"))
    monkeypatch.setattr(type(planted.cache), "rows", lambda self, splits: rows)
    with pytest.raises(ValueError, match="splits must not share examples, got 601 in both"):
        _run(planted, None)


def test_empty_split_is_refused(planted, fake_cache):
    cache = planted.cache
    copy = fake_cache(cache.tokens, cache.acts, torch.zeros_like(cache.split), cache.source)
    with pytest.raises(ValueError, match="split 'score' must have rows, got none"):
        _run(_with_cache(planted, copy), None)


def test_result_is_the_same_every_time(planted, finished, tmp_path):
    _, out = finished
    _run(planted, tmp_path)
    for name in (tables.LATENTS, tables.EXAMPLES, tables.SUMMARY):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_nothing_is_written_without_a_directory(planted):
    explained = _run(planted, None)
    assert explained.latents_path is None
    assert explained.examples_path is None


def test_latents_file_holds_what_was_found(planted, finished):
    explained, _ = finished
    records = read_latents(explained.latents_path)
    assert [record.latent for record in records] == list(range(20))
    assert [record.status for record in records] == list(explained.status)
    first = records[0]
    assert first.kind == "word"
    assert first.label.startswith('word: "topic')
    assert set(first.words[:3]) == planted.words[0]
    assert len(first.words) == len(first.weights) == len(first.npmi) == len(first.joint)
    assert first.auc == explained.scores.auc[0]
    assert first.low < first.auc < first.high
    assert first.auc_wide == explained.wide.auc[0]
    assert sum(first.histogram) == first.n_fired_explain + first.n_fired_score
    n_rows = explained.summary.n_rows_explain + explained.summary.n_rows_score
    assert first.density == pytest.approx(sum(first.histogram) / n_rows)


def test_what_was_not_scored_has_no_figures(planted, finished):
    explained, _ = finished
    records = read_latents(explained.latents_path)
    for latent in (planted.silent, planted.rare):
        record = records[latent]
        assert (record.label, record.kind, record.words) == ("", "", ())
        assert record.auc is record.low is record.control_auc is record.p_value is None
    assert records[planted.silent].max_activation == 0
    assert records[planted.rare].max_activation == 1


def _n_contexts(cache, latent: int) -> int:
    """The three largest peaks, then at most two of each fifth of the largest."""
    split = cache.examples.split.numpy()
    peaks = cache.acts[split < 2, 1:, latent].numpy().max(axis=1)  # position 0 has no row
    peaks = np.sort(peaks[peaks > 0])[::-1]
    rest = np.ceil(peaks[3:] / peaks[0] * 5) if len(peaks) else peaks
    return min(len(peaks), 3) + sum(min(2, int((rest == fifth).sum())) for fifth in range(1, 6))


def test_contexts_of_one_latent_are_read_alone(planted, finished, monkeypatch):
    explained, _ = finished
    path = explained.examples_path
    everything = read_examples(path)
    assert [c.latent for c in everything] == sorted(c.latent for c in everything)
    for latent in (0, 16, planted.rare, planted.silent):
        alone = read_examples(path, latent)
        assert alone == [c for c in everything if c.latent == latent]
        assert len(alone) == _n_contexts(planted.cache, latent)
    best = read_examples(path, 5)[0]
    acts = planted.cache.acts[best.example, best.start : best.start + 17, 5]
    assert best.activations == pytest.approx(acts.tolist())
    assert acts.max() == planted.cache.acts[..., 5].max()


def test_a_row_group_holds_few_latents(tmp_path: Path):
    contexts = [
        Context(latent, 0, 1.0, 3, "score", "novels", 0, 0, (" a",), (1.0,))
        for latent in range(131)
    ]
    tables.write_tables(tmp_path, [], contexts, 1, {})
    stored = pq.ParquetFile(tmp_path / tables.EXAMPLES)
    assert [stored.metadata.row_group(i).num_rows for i in range(3)] == [64, 64, 3]
    assert read_examples(tmp_path / tables.EXAMPLES, 130) == [contexts[130]]


def test_summary_file_says_what_was_done(finished):
    explained, out = finished
    summary = json.loads((out / tables.SUMMARY).read_text(encoding="utf-8"))
    assert summary["config"]["top_contexts"] == 3
    assert summary["n_scored"] == 18
    assert summary["auc"]["mean"] == explained.summary.auc.mean
    assert sorted(path.name for path in out.iterdir()) == [
        "examples.parquet", "files.json", "latents.parquet", "summary.json",
    ]  # fmt: skip


def test_failure_leaves_no_summary_and_the_old_tables(finished, planted, tmp_path, monkeypatch):
    _run(planted, tmp_path)
    before = (tmp_path / tables.LATENTS).read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables.pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        _run(planted, tmp_path, ExplainConfig(seed=1))
    assert not (tmp_path / tables.SUMMARY).exists()
    assert (tmp_path / tables.LATENTS).read_bytes() == before


def test_a_dictionary_without_enough_firings_has_no_mean(planted):
    explained = _run(planted, None, ExplainConfig(min_firings=100_000))
    summary = explained.summary
    assert (summary.n_scored, summary.n_insufficient, summary.n_dead) == (0, 19, 1)
    assert math.isnan(summary.auc.mean)
    assert summary.auc_all_live == 0.5


def test_a_table_of_other_columns_is_refused(finished, tmp_path):
    _, out = finished
    with pytest.raises(ValueError, match=r"columns of .* must be .*'weights'.*, got .*'tokens'"):
        read_latents(out / tables.EXAMPLES)
    with pytest.raises(FileNotFoundError, match="must be a file; run `sae explain` to make it"):
        read_latents(tmp_path / "missing.parquet")


def test_every_stage_reports_to_its_end(planted, tmp_path):
    last: dict[str, tuple[int, int]] = {}
    _run(planted, tmp_path, CONFIG, lambda done, total, unit: last.update({unit: (done, total)}))
    assert set(last) == {
        "rows encoded", "passes over the text", "permutations of the unseen texts",
        "latents' contexts", "latents searched for concepts",
    }  # fmt: skip
    assert all(done == total for done, total in last.values())


def test_untrained_latents_stand_beside_them(planted, finished):
    explained, out = finished
    written = json.loads((out / tables.SUMMARY).read_text())
    assert next(iter(written)) == "n_insufficient"  # what failed comes first
    assert set(written["baselines"]) == {"random directions", "raw neurons"}
    for name, arm in explained.baselines.items():
        assert arm.n_latents == CONFIG.n_baseline
        assert written["baselines"][name]["auc"]["mean"] == arm.auc.mean
    directions = explained.baselines["random directions"]  # they mix the topics
    assert directions.auc.mean < explained.summary.auc.mean
    assert explained.summary.beats_null.mean == pytest.approx(17 / 19, abs=1 / 19)
    assert explained.summary.beats_null.low < explained.summary.beats_null.mean
