"""The conformance suite: both of our sources pass it, and it catches sources that break a rule."""

import dataclasses

import pytest
import torch

from activations_cache import build, stream
from activations_cache.batches import Batch
from activations_cache.testing import check_batch_source, synthetic_plan, write_synthetic


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_cache_passes(tmp_path, dtype):
    plan = synthetic_plan({"a.1:out": 7, "a.2:in": 5}, n_examples=61, dtype=dtype)
    check_batch_source(write_synthetic(tmp_path, plan), batch=53)


def test_a_compressed_cache_passes(tmp_path):
    plan = synthetic_plan({"a.1:out": 7}, n_examples=61, compression="zstd")
    check_batch_source(write_synthetic(tmp_path, plan), batch=53)


@pytest.mark.parametrize("attention", ["context", "document"])
def test_a_cache_of_text_and_a_live_model_pass(tiny_cache_config, tmp_path, attention):
    text = dataclasses.replace(tiny_cache_config.text, attention=attention)
    config = dataclasses.replace(tiny_cache_config, text=text)
    check_batch_source(build(config, tmp_path), batch=97)
    check_batch_source(stream(config), batch=97)


class Broken:
    """A cache that breaks one rule."""

    def __init__(self, cache, rule: str):
        self.cache, self.rule, self.hook_points = cache, rule, cache.hook_points
        self.calls = 0

    def rows(self, splits=("explain", "score", "hold")):
        rows = self.cache.rows(splits)
        return rows[:-1] if self.rule == "split" and len(splits) == 1 else rows

    def n_batches(self, **arguments):
        return self.cache.n_batches(**arguments) + (self.rule == "count")

    def batches(self, hook_points=None, *, seed, start=0, **arguments):
        self.calls += 1
        seed += {"seed": -seed, "drift": self.calls}.get(self.rule, 0)
        n_before = 0 if self.rule == "resume" else start
        for part in self.cache.batches(hook_points, seed=seed, start=n_before, **arguments):
            yield self.change(part)

    def change(self, part: Batch) -> Batch:
        x, rows = part
        match self.rule:
            case "twice":
                rows = torch.cat([rows[1:], rows[1:2]])
            case "double":
                x = x.double()
            case "not finite":
                x = x / 0
            case "sorted":
                order = rows.argsort()
                x, rows = x[order], rows[order]
            case "values":
                x = x + torch.randn(())
            case "width":
                x = x[:, 1:]
        return Batch(x, rows)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("split", "exactly one split"),
        ("count", "as many batches as it says"),
        ("twice", "exactly once per epoch"),
        ("not finite", "finite"),
        ("sorted", "shuffle its rows"),
        ("values", "same values again"),
        ("seed", "another order for another seed"),
        ("drift", "the same order for the same seed"),
        ("resume", "go on from batch 1"),
        ("width", "side by side"),
    ],
)
def test_a_source_that_breaks_a_rule_is_caught(tmp_path, rule, said):
    plan = synthetic_plan({"a.1:out": 7, "a.2:in": 5}, n_examples=61)
    cache = write_synthetic(tmp_path, plan)
    with pytest.raises(AssertionError, match=said):
        check_batch_source(Broken(cache, rule), batch=53)
