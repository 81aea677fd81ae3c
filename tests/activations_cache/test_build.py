"""From a configuration to a cache: the model's own numbers, resumed, shared, recognised."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import activations_cache
from activations_cache import builder, io
from activations_cache.builder import build, rank_of_this_process
from activations_cache.checks import CacheFormatError, DiskFullError, NonFiniteError
from activations_cache.config import CacheConfig, TextSource
from activations_cache.hooks import capture
from activations_cache.models import LoadedModel
from activations_cache.reader import ActivationCache
from tests.activations_cache.ranks import build_in_ranks


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of several processes; what is synced when is tested elsewhere."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(io, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def cache(tiny_cache_config: CacheConfig, tmp_path_factory: pytest.TempPathFactory):
    return build(tiny_cache_config, tmp_path_factory.mktemp("build") / "cache")


def content(path: Path) -> dict[str, bytes]:
    varying = ("journal", "manifest.json", ".locks")
    files = (p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file())
    return {str(f): (path / f).read_bytes() for f in files if not str(f).startswith(varying)}


def test_rows_are_the_hidden_states_of_the_model(
    cache: ActivationCache, tiny_model: LoadedModel, tiny_cache_config: CacheConfig
):
    hidden = tiny_model.model(cache.examples.tokens, output_hidden_states=True).hidden_states
    refs = cache.refs(cache.rows())
    for name, layer in (("model.layers.1:out", 2), ("model.layers.3:in", 3)):
        expected = hidden[layer][refs.example, refs.position]
        assert torch.allclose(cache[name][cache.rows()], expected, rtol=1e-4, atol=1e-5)
        wrong = hidden[layer - 1][refs.example, refs.position]
        assert not torch.allclose(cache[name][cache.rows()], wrong, rtol=1e-2, atol=1e-2)
    assert cache.verify() == []


def test_rows_of_explain_and_score_are_at_least_what_is_asked_for(
    cache: ActivationCache, tiny_cache_config: CacheConfig
):
    n_rows = len(cache.rows(("explain", "score")))
    per_context = tiny_cache_config.text.context - tiny_cache_config.skip_positions
    assert tiny_cache_config.n_rows <= n_rows < tiny_cache_config.n_rows + per_context
    assert len(cache.rows(("hold",))) > 0
    assert cache.n_rows == len(cache.examples) * per_context
    assert 0 not in cache.refs(cache.rows()).position


def test_labels_and_sources_are_carried_along(cache: ActivationCache):
    assert cache.examples.source_names == ("tiny", "tiny_records")
    assert cache.label_names == ("noun.animal", "noun.plant", "verb.motion")
    labels, refs = cache.token_labels(cache.rows()), cache.refs(cache.rows())
    from_records = cache.examples.source[refs.example] == 1
    assert set(labels[~from_records].tolist()) == {-1}
    assert {0, 1, 2} <= set(labels[from_records].tolist())


def test_identity_and_provenance_say_what_it_was_made_from(
    cache: ActivationCache, tiny_model: LoadedModel, tiny_cache_config: CacheConfig
):
    assert cache.identity["model"] == tiny_model.identity
    assert cache.identity["contexts_per_forward"] == tiny_cache_config.contexts_per_forward
    assert cache.identity["dtype"] == "float32"
    assert cache.hook_points == tiny_cache_config.hook_points
    provenance = cache.manifest.provenance
    assert provenance["device"] == "cpu"
    assert provenance["threads"] == torch.get_num_threads()
    assert provenance["versions"]["torch"] == torch.__version__
    assert str(tiny_cache_config.model.path) not in json.dumps(cache.identity)


def test_a_complete_cache_is_opened_without_the_model(
    cache: ActivationCache, tiny_cache_config: CacheConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(builder, "load_on_device")
    again = build(tiny_cache_config, cache.path)
    assert again.fingerprint == cache.fingerprint


def test_another_configuration_is_refused_with_the_key_and_both_values(
    cache: ActivationCache, tiny_cache_config: CacheConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(builder, "load_on_device")
    for change, message in (
        ({"n_rows": 2003}, r"another config\.n_rows: expected 2003, got 1009; choose another"),
        ({"dtype": "bfloat16"}, r"another config\.dtype: expected 'bfloat16', got 'float32'"),
        (
            {"text": replace(tiny_cache_config.text, seed=4)},
            r"another config\.text\.seed: expected 4, got 3",
        ),
    ):
        with pytest.raises(CacheFormatError, match=message):
            build(replace(tiny_cache_config, **change), cache.path)


def test_a_changed_text_file_is_noticed(tiny_cache_config: CacheConfig, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text(Path(tiny_cache_config.text.sources[0].path).read_text())
    sources = (replace(tiny_cache_config.text.sources[0], path=str(text)),)
    config = replace(
        tiny_cache_config, text=replace(tiny_cache_config.text, sources=sources), n_rows=61
    )
    build(config, tmp_path / "cache")
    os.utime(text, (0, 0))
    build(config, tmp_path / "cache")
    text.write_text(text.read_text() + "\n")
    with pytest.raises(CacheFormatError, match=r"got another files\..*text\.txt: expected \["):
        build(config, tmp_path / "cache")


def test_a_stopped_build_goes_on_to_the_same_bytes(
    cache: ActivationCache, tiny_cache_config: CacheConfig, tmp_path: Path
):
    class Stop(Exception):
        pass

    def stop(done: int, total: int, unit: str) -> None:
        if unit == "rows" and done > 400:
            raise Stop

    with pytest.raises(Stop):
        build(tiny_cache_config, tmp_path / "cache", progress=stop)
    with pytest.raises(CacheFormatError, match=r"must be finished, got 3 of 10 shards"):
        activations_cache.open(tmp_path / "cache")
    seen = []
    build(tiny_cache_config, tmp_path / "cache", progress=lambda *step: seen.append(step))
    assert content(tmp_path / "cache") == content(cache.path)
    rows = [(done, total) for done, total, unit in seen if unit == "rows"]
    assert rows[0] == (3 * 120 + 120, cache.n_rows)
    assert rows[-1] == (cache.n_rows, cache.n_rows)
    assert [done for done, _ in rows] == sorted(done for done, _ in rows)


def test_three_processes_build_one_cache(
    cache: ActivationCache, tiny_cache_config: CacheConfig, tmp_path: Path
):
    assert build_in_ranks(3, tiny_cache_config, tmp_path / "cache") == [0, 0, 0]
    assert content(tmp_path / "cache") == content(cache.path)
    journals = [j.read_bytes() for j in (tmp_path / "cache").glob("journal.rank*.jsonl")]
    assert sum(journal.count(b"\n") for journal in journals) == cache.manifest.plan.n_shards


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "3"}, (1, 3)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "5"}, (2, 5)),
        ({"RANK": "1", "WORLD_SIZE": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (1, 3)),
    ],
)
def test_rank_comes_from_torchrun_or_slurm(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: tuple[int, int]
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank_of_this_process() == expected


def test_a_rank_beyond_the_world_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="RANK must be below WORLD_SIZE=3, got 3"):
        rank_of_this_process()


def test_what_cannot_fit_is_refused_before_the_model_is_loaded(
    tiny_cache_config: CacheConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(builder, "load_on_device")
    config = replace(tiny_cache_config, n_rows=10**13)
    with pytest.raises(DiskFullError, match=r"must have room for about [\d,.]+ MB, got [\d,.]+ MB"):
        build(config, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_hook_point_that_config_json_does_not_tell_is_measured(
    tiny_cache_config: CacheConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(builder, "pack")
    config = replace(
        tiny_cache_config, n_rows=10**13, hook_points=("model.layers.1.mlp.down_proj:in",)
    )
    with pytest.raises(DiskFullError, match="must have room for about"):
        build(config, tmp_path / "cache")


def test_the_model_is_read_in_the_forwards_that_the_configuration_says(
    cache: ActivationCache, tiny_model: LoadedModel, tiny_cache_config: CacheConfig
):
    """A row depends on which contexts are read together, so this is part of the contract."""
    plan = cache.manifest.plan
    shard = plan.examples_of(2)
    with capture(tiny_model.model, tiny_cache_config.hook_points) as run:
        first = run(cache.examples.tokens[shard.start : shard.start + 5][:4])
    start = 2 * plan.rows_per_shard
    for name in cache.hook_points:
        expected = first[name][:, 1:].reshape(-1, plan.hook_points[name])
        assert torch.equal(cache[name][start : start + len(expected)], expected)


def test_a_model_that_gives_nan_is_refused(
    tiny_cache_config: CacheConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(self: object, numbers: range) -> dict[str, torch.Tensor]:
        plan = self.plan  # type: ignore[attr-defined]
        return {
            name: torch.full((len(numbers), plan.context, d), math.nan)
            for name, d in plan.hook_points.items()
        }

    monkeypatch.setattr(builder.ModelSource, "__call__", broken)
    with pytest.raises(NonFiniteError, match=r"rows must be finite in float32, up to 0\.01%"):
        build(tiny_cache_config, tmp_path / "cache")


def test_records_without_text_are_named_in_the_provenance(
    tiny_cache_config: CacheConfig, tiny_records: Path, tmp_path: Path
):
    lines = tiny_records.read_text().splitlines()
    some = [*lines[:300], '{"gloss": null}', *lines[300:], '{"gloss": null}']
    (tmp_path / "some.jsonl").write_text("\n".join(some) + "\n")
    source = TextSource(path=str(tmp_path / "some.jsonl"), field="gloss")
    text = replace(tiny_cache_config.text, sources=(source,))
    built = activations_cache.build(
        replace(tiny_cache_config, text=text, n_rows=200), tmp_path / "cache"
    )
    assert built.manifest.provenance["skipped_records"] == {"some": 2}
    source = TextSource(path=str(tiny_records), field="gloss")
    whole = replace(tiny_cache_config.text, sources=(source,))
    other = activations_cache.build(
        replace(tiny_cache_config, text=whole, n_rows=200), tmp_path / "whole"
    )
    assert "skipped_records" not in other.manifest.provenance
