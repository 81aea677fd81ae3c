"""A live model trains what a cache of the same rows trains, in memory that is stated before."""

import json
import logging
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import activations_cache
from activations_cache import io
from activations_cache.builder import write_shards
from activations_cache.live import ActivationStream
from activations_cache.reader import ActivationCache
from activations_cache.testing import synthetic_plan, write_synthetic
from activations_cache.writer import CacheWriter
from sae.architecture import BatchTopK, TopK
from sae.train import checkpoint, live
from sae.train.config import AuxK, DictionaryConfig, TrainConfig
from sae.train.fit import train
from sae.train.signals import Stopped

BATCH, N_ROWS, N_KNOWN = 61, 1300, 300
INPUTS = {"inputs": ("model.layers.1:out",)}
ENTRIES = {
    "topk": DictionaryConfig(d_sae=37, activation=TopK(k=3), auxk=AuxK(), **INPUTS),
    "batchtopk": DictionaryConfig(d_sae=37, activation=BatchTopK(k=3), **INPUTS),
    "transcoder": DictionaryConfig(
        d_sae=37, activation=TopK(k=3), b_in="none", outputs=("model.layers.3:in",), **INPUTS
    ),
}
CONFIG = TrainConfig(
    saes=ENTRIES, batch=BATCH, precision="fp32", source="live", n_rows=N_ROWS, buffer_rows=620
)


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def made_by(request, tiny_cache_config):
    return replace(tiny_cache_config, n_rows=N_KNOWN, dtype=request.param)


@pytest.fixture(scope="module")
def cache(made_by, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "fsync", lambda descriptor: None)
        return activations_cache.build(made_by, tmp_path_factory.mktemp("live") / "cache")


@pytest.fixture(scope="module")
def recorded(cache, tmp_path_factory):
    """A run, the order of its rows, and the source of its rows."""
    order, sources, path = [], [], tmp_path_factory.mktemp("live") / "run"
    with pytest.MonkeyPatch.context() as patch:
        batches, made = ActivationStream.batches, ActivationStream.__init__

        def noted(self, *args, **named):
            for batch in batches(self, *args, **named):
                order.append(batch.rows)
                yield batch

        def taken(self, source, *args, **named):
            sources.append(source)
            made(self, source, *args, **named)

        patch.setattr(ActivationStream, "batches", noted)
        patch.setattr(ActivationStream, "__init__", taken)
        train(cache, CONFIG, path)
    return path, order, sources[0]


class Replay(ActivationCache):
    """The statistics of one cache, and the rows of another in a recorded order."""

    def __init__(self, small, rows_of, order) -> None:
        vars(self).update(vars(small))
        self.rows_of, self.order = rows_of, order

    def n_batches(self, **_) -> int:
        return len(self.order)

    def batches(self, hook_points, **_):
        for rows in self.order:
            x = torch.cat([self.rows_of[point][rows] for point in hook_points], dim=1)
            yield activations_cache.batches.Batch(x, rows)


def weights(path):
    return {name: load_file(path / name / "sae.safetensors") for name in ENTRIES}


def require_equal(one, other):
    for name, tensors in weights(one).items():
        for key, value in weights(other)[name].items():
            assert torch.equal(tensors[key], value), (name, key)


def test_a_dictionary_is_bit_equal_to_one_from_a_cache_in_the_same_order(cache, recorded, tmp_path):
    path, order, source = recorded
    assert len(order) == N_ROWS // BATCH
    with CacheWriter(tmp_path / "whole", source.plan) as writer:
        write_shards(writer, source, 5, 1, lambda *_: None)
        writer.finish({})
    whole = activations_cache.open(tmp_path / "whole")
    config = TrainConfig(saes=ENTRIES, batch=BATCH, precision="fp32")
    train(Replay(cache, whole, order), config, tmp_path / "run")
    require_equal(path, tmp_path / "run")


def test_no_row_is_of_the_cache_or_held_out_and_none_comes_twice(cache, recorded):
    _, order, source = recorded
    rows = torch.cat(order)
    assert len(rows.unique()) == len(rows)
    known = {ids.numpy().tobytes() for ids in cache.examples.tokens.int()}
    live_ids = [ids.numpy().tobytes() for ids in source.examples.tokens.int()]
    assert len(known) == len(cache.examples)
    assert not known & {*live_ids}
    assert set(source.examples.split.tolist()) == {0, 1}


def test_nothing_of_a_row_is_on_the_disk(recorded):
    path = recorded[0]
    files = [file for file in path.rglob("*") if file.is_file()]
    assert not [file for file in files if "text" in file.name]
    provenance = json.loads((path / "topk" / "provenance.json").read_text())
    assert provenance["live"]["buffer_rows"] == 620
    assert provenance["rows"] == N_ROWS // BATCH * BATCH


def test_a_run_that_was_stopped_goes_on_bit_equal(cache, recorded, tmp_path):
    def stop(done, _total, unit):
        if unit.startswith("rows") and done == 9 * BATCH:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(cache, CONFIG, tmp_path / "run", progress=stop)
    assert not (tmp_path / "run" / "topk").exists()
    train(cache, CONFIG, tmp_path / "run")
    require_equal(recorded[0], tmp_path / "run")


def test_the_source_and_the_buffer_belong_to_the_run(cache, recorded, monkeypatch, tmp_path):
    class Found(Exception):
        pass

    def identity(config):
        def found(_root, value):
            raise Found(value)

        monkeypatch.setattr(checkpoint, "load_newest", found)
        with pytest.raises(Found) as said:
            train(cache, config, tmp_path / "run")
        return str(said.value)

    changed = [
        CONFIG,
        replace(CONFIG, buffer_rows=950),
        replace(CONFIG, n_rows=N_ROWS + 100),
        replace(CONFIG, max_norm=None),
        replace(CONFIG, source="cache", n_rows=None, buffer_rows=131_072),
    ]
    assert len({identity(config) for config in changed}) == len(changed)


def test_two_processes_share_the_examples(cache, tmp_path, in_processes):
    for attempt in ("one", "other"):
        running = in_processes(2, lambda a=attempt: train(cache, CONFIG, tmp_path / a))
        for process, said in running.items():
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            assert code == 0, said.read_text()
    require_equal(tmp_path / "one", tmp_path / "other")
    assert not list((tmp_path / "one").rglob("text.*"))


def test_the_memory_of_the_buffer_is_stated_and_one_that_is_too_large_is_refused(
    cache, monkeypatch, caplog, tmp_path
):
    caplog.set_level(logging.INFO)
    size = {"bfloat16": 2, "int8": 4}[cache.manifest.plan.dtype]
    assert live.row_bytes(cache, cache.hook_points) == size * 2 * 23
    live.require_buffer(1 << 20, 256)
    assert "the buffer of 1,048,576 rows takes 256.0 MiB" in caplog.messages
    with pytest.raises(ValueError, match=r"train\.buffer_rows must be at least 300, got 200"):
        train(cache, replace(CONFIG, buffer_rows=200), tmp_path / "run")
    huge = replace(CONFIG, buffer_rows=1 << 50)
    rule = r"train\.buffer_rows must fit into memory, .* GiB free, got 1,125,899,906,842,624 rows"
    with pytest.raises(ValueError, match=rule):
        train(cache, huge, tmp_path / "run")


def test_a_cache_that_holds_nothing_out_is_refused(made_by, tmp_path):
    text = replace(made_by.text, explain=0.7, score=0.3, hold=0.0)
    nothing = activations_cache.build(replace(made_by, text=text), tmp_path / "cache")
    rule = r"cache must hold documents out beside train\.source 'live', got none"
    with pytest.raises(ValueError, match=rule):
        train(nothing, CONFIG, tmp_path / "run")


def test_a_cache_without_a_model_is_refused(tmp_path):
    plan = synthetic_plan({"model.layers.1:out": 7, "model.layers.3:in": 5}, n_examples=61)
    rows = write_synthetic(tmp_path / "cache", plan)
    with pytest.raises(ValueError, match=r"must name its model beside train\.source 'live'"):
        train(rows, CONFIG, tmp_path / "run")


def test_a_text_that_ends_early_costs_one_line_and_no_cache(cache, tmp_path):
    too_many = replace(CONFIG, n_rows=1_000_000)
    with pytest.raises(ValueError, match="text must give at least 1000300 rows of explain and"):
        train(cache, too_many, tmp_path / "run")
    assert not cache.verify()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_rows": None}, "n_rows must be given beside source 'live', got None"),
        ({"n_rows": BATCH - 1}, "n_rows must be at least 61, got 60"),
        ({"buffer_rows": 100}, "buffer_rows must be at least 122, got 100"),
        ({"latent_shards": 2}, "latent_shards must be 1 beside source 'live'"),
        (
            {"source": "cache", "n_rows": None},
            r"buffer_rows must be absent where train\.source is not 'live', got 620",
        ),
        ({"source": "cache"}, r"n_rows must be absent where train\.source is not 'live', got 1300"),
    ],
)
def test_what_does_not_fit_a_live_source_is_refused_at_once(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **fields)
