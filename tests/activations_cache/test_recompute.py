"""`sae verify --model`: the model's own cache agrees, every seeded mistake is refused."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from activations_cache.builder import load_source, write_shards
from activations_cache.checks import silent
from activations_cache.config import CacheConfig
from activations_cache.hooks import hook_points_of
from activations_cache.reader import ActivationCache, open_cache
from activations_cache.recompute import N_ROWS, recompute
from activations_cache.writer import CacheWriter

BLOCK = "model.layers.1"
LAST = "model.layers.4"


def made_of(claimed: str, taken: str, config: CacheConfig, loaded, path: Path) -> ActivationCache:
    """Build a cache whose rows are called `claimed` and come from `taken`."""
    right = dataclasses.replace(config, hook_points=(taken,))
    source = load_source(right, loaded, silent)

    class Mistaken:
        plan = dataclasses.replace(
            source.plan, hook_points={claimed: source.plan.hook_points[taken]}
        )
        examples = source.examples

        def __call__(self, numbers: range):
            return {claimed: source(numbers)[taken]}

    with CacheWriter(path, Mistaken.plan) as writer:
        write_shards(writer, Mistaken(), config.contexts_per_forward, 1, silent)
        writer.finish({})
    return open_cache(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_site_of_the_model_agrees(tmp_path, tiny_cache_config, tiny_model, dtype):
    config = dataclasses.replace(
        tiny_cache_config, hook_points=tuple(hook_points_of(tiny_model.model)), dtype=dtype
    )
    source = load_source(config, tiny_model, silent)
    with CacheWriter(tmp_path, source.plan) as writer:
        write_shards(writer, source, 5, 1, silent)
        writer.finish({})
    reports = []
    cache = open_cache(tmp_path)
    assert recompute(cache, tiny_model, progress=lambda *a: reports.append(a)) == []
    assert len(cache.hook_points) == 25
    assert reports[-1][0] >= reports[-1][1] > 1


@pytest.mark.parametrize(
    ("claimed", "taken"),
    [
        (f"{BLOCK}:out", "model.layers.0:out"),
        (f"{BLOCK}:out", "model.layers.2:out"),
        (f"{BLOCK}:out", f"{BLOCK}:in"),
        (f"{BLOCK}:in", f"{BLOCK}:out"),
        (f"{LAST}:out", "model.norm:out"),
        (f"{LAST}:out", f"{LAST}:in"),
        (f"{BLOCK}.self_attn:out", f"{BLOCK}.mlp:out"),
        (f"{BLOCK}.mlp:in", f"{BLOCK}.mlp:out"),
        (f"{BLOCK}.mlp:out", "model.layers.2.mlp:out"),
    ],
)
def test_a_wrong_place_is_refused(tmp_path, tiny_cache_config, tiny_model, claimed, taken):
    cache = made_of(claimed, taken, tiny_cache_config, tiny_model, tmp_path)
    (problem,) = recompute(cache, tiny_model)
    assert problem.startswith(claimed)
    assert f"of {N_ROWS} rows" in problem


@pytest.fixture
def right(tmp_path, tiny_cache_config, tiny_model) -> ActivationCache:
    return made_of(f"{BLOCK}:out", f"{BLOCK}:out", tiny_cache_config, tiny_model, tmp_path)


@pytest.mark.parametrize("key", ["tokenizer_sha256", "model_sha256", "dtype"])
def test_another_hash_is_refused(right, tiny_model, key):
    other = {"dtype": "bfloat16"}.get(key, "0" * 64)
    changed = dataclasses.replace(tiny_model, identity={**tiny_model.identity, key: other})
    (problem,) = recompute(right, changed)
    assert (
        problem == f"{key} of the model must be the cache's {tiny_model.identity[key]}, got {other}"
    )


def test_weights_that_changed_behind_the_same_hash_are_refused(right, tiny_model):
    other = copy.deepcopy(tiny_model.model)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    assert len(recompute(right, dataclasses.replace(tiny_model, model=other))) == 1


def test_a_model_of_another_width_is_refused(right, tiny_model):
    plan = dataclasses.replace(right.manifest.plan, hook_points={f"{BLOCK}:out": 5})
    right.manifest = dataclasses.replace(right.manifest, plan=plan)
    right[f"{BLOCK}:out"].d_model = 5
    (problem,) = recompute(right, tiny_model)
    assert "must be 5 wide as in the cache, got 23" in problem
