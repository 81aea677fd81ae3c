"""What the documents speak of, at their names: a run of the demo, on a tiny model of 17 blocks."""

import json
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import activations_cache
import sae
from activations_cache.config import CacheConfig
from sae.architecture import TopK
from sae.evaluate import EvaluateConfig, evaluate
from sae.train import DictionaryConfig, TrainConfig, train

HOOK = "model.layers.15:out"


@pytest.fixture(scope="session")
def demo_config(tmp_path_factory, tiny_cache_config, tiny_tokenizer) -> CacheConfig:
    torch.manual_seed(11)
    model = tmp_path_factory.mktemp("demo_model")
    config = LlamaConfig(
        vocab_size=307, hidden_size=37, intermediate_size=41, num_hidden_layers=17,
        num_attention_heads=1, head_dim=4, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    path = replace(tiny_cache_config.model, path=str(model))
    return replace(tiny_cache_config, model=path, hook_points=(HOOK,), n_rows=5003)


@pytest.fixture(scope="session")
def demo(tmp_path_factory, demo_config, tiny_text) -> Path:
    """A directory that has `runs/demo` with a cache and the dictionary `topk`, with statistics.

    Beside it lie a reader's own model and text, `my_model` and `my_texts.jsonl`.
    """
    root = tmp_path_factory.mktemp("demo")
    run = root / "runs" / "demo"
    (root / "my_model").symlink_to(demo_config.model.path)
    chapters = tiny_text.read_text().split("CHAPTER")[1:]
    lines = [json.dumps({"text": chapter}) for chapter in chapters]
    (root / "my_texts.jsonl").write_text("\n".join(lines))
    cache = activations_cache.build(demo_config, run / "cache")
    entries = {"topk": DictionaryConfig(d_sae=131, activation=TopK(k=32))}
    [path] = train(cache, TrainConfig(saes=entries, batch=499), run / "train").values()
    result = evaluate(
        {"topk": sae.load(path)}, cache, HOOK, None, EvaluateConfig(n_rows_firing=499)
    )
    result.firing["topk"].save(path)
    return root


@pytest.fixture(scope="session")
def site(repository) -> ModuleType:
    """docs/site.py."""
    spec = spec_from_file_location("site_pages", repository / "docs" / "site.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
