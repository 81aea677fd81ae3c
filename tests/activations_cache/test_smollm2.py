"""A cache of SmolLM2 on real text: built, whole, and agreeing with the model."""

import pytest

from activations_cache.builder import load_source, write_shards
from activations_cache.checks import silent
from activations_cache.config import CacheConfig, ModelConfig, TextConfig, TextSource
from activations_cache.reader import open_cache
from activations_cache.recompute import recompute
from activations_cache.writer import CacheWriter

GLOSSES = "package://sae/demo_data/wordnet_glosses.jsonl.gz"


@pytest.mark.real
@pytest.mark.parametrize("attention", ["context", "document"])
def test_a_cache_of_smollm2_agrees_with_the_model(tmp_path, smollm2, attention):
    config = CacheConfig(
        model=ModelConfig(path=smollm2.provenance["path"]),
        text=TextConfig(
            sources=(TextSource(path=GLOSSES, field="gloss", label="supersense"),),
            context=64,
            attention=attention,
        ),
        hook_points=("model.layers.15:out", "model.layers.29:out", "model.layers.7.mlp:out"),
        n_rows=1009,
        rows_per_shard=509,
        contexts_per_forward=8,
        skip_positions=2,
    )
    source = load_source(config, smollm2, silent)
    with CacheWriter(tmp_path, source.plan) as writer:
        write_shards(writer, source, config.contexts_per_forward, 1, silent)
        writer.finish({})
    cache = open_cache(tmp_path)
    assert len(cache.rows(("explain", "score"))) >= 1009
    assert cache.verify() == []
    assert recompute(cache, smollm2) == []
    assert cache["model.layers.15:out"].statistics.norm_quantiles["1"] < 3000  # no sink among them
