"""TransformerLens' words are places of the model: what a block adds up to shows it."""

import pytest
import torch
import transformers

from activations_cache.hooks import capture
from sae.pretrained.catalogue import every, family_of_model
from sae.pretrained.hook_names import FAMILIES, family_of, lens_name, module_path

D_MODEL, HEADS = 24, 3
SIZES = {
    "hidden_size": D_MODEL, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS, "head_dim": 8, "intermediate_size": 36, "vocab_size": 31,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 12, "decoder_sparse_step": 1,
}  # fmt: skip
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "mistral": ("MistralForCausalLM", "MistralConfig", SIZES),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", SIZES | EXPERTS),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SIZES),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SIZES),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", SIZES | EXPERTS),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", SIZES),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SIZES),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", SIZES),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", SIZES | EXPERTS),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", SIZES),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", SIZES),
    "phi": ("PhiForCausalLM", "PhiConfig", SIZES),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SIZES),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": D_MODEL, "n_layer": 2, "n_head": HEADS}),
    "gptj": (
        "GPTJForCausalLM", "GPTJConfig",
        {"n_embd": D_MODEL, "n_layer": 2, "n_head": HEADS, "rotary_dim": 4},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        SIZES | {"ffn_dim": 36, "word_embed_proj_dim": D_MODEL, "max_position_embeddings": 64},
    ),
}  # fmt: skip
PARALLEL = ("phi", "gptj", "gpt_neox")
"""Families whose attention and MLP both read the stream before the block."""
VISUAL = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text"}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def make(family: str):
    torch.manual_seed(3)
    kind, config, sizes = MODELS[family]
    small = {"vocab_size": 31} | sizes
    return getattr(transformers, kind)(getattr(transformers, config)(**small)).eval()


@pytest.mark.parametrize("family", MODELS)
def test_words_are_the_places_that_they_name(family):
    model = make(family)
    words = [f"blocks.1.{place}" for place in FAMILIES[family].places]
    points = {word: module_path(word, family) for word in [*words, "hook_embed"]}
    with capture(model, list(points.values()), stop=False) as run:
        seen = run(IDS)
    stream = {word.removeprefix("blocks.1."): seen[point] for word, point in points.items()}
    before, after = stream["hook_resid_pre"], stream["hook_resid_post"]
    assert before.shape == stream["hook_embed"].shape == (2, 5, D_MODEL)
    middle = before + stream["hook_attn_out"]
    if family != "opt":
        added = middle + stream["hook_mlp_out"].view(middle.shape)
        assert torch.allclose(added, after, atol=1e-5)
    assert (family in (*PARALLEL, "opt")) == ("hook_resid_mid" not in stream)
    if "hook_resid_mid" in stream:
        assert torch.allclose(stream["hook_resid_mid"], middle, atol=1e-5)
    assert stream["attn.hook_z"].shape[-1] == D_MODEL
    assert not torch.equal(stream["attn.hook_z"], stream["hook_attn_out"])
    if "mlp.hook_pre" in stream:
        assert stream["mlp.hook_pre"].shape == stream["mlp.hook_post"].shape
        assert not torch.equal(stream["mlp.hook_pre"], stream["mlp.hook_post"])
    assert family_of(type(model).__name__) == family


@pytest.mark.parametrize("family", FAMILIES)
def test_every_word_of_a_family_comes_back(family):
    words = [f"blocks.7.{place}" for place in FAMILIES[family].places]
    for word in [*words, "hook_embed"]:
        point = module_path(word, family)
        assert point is not None
        assert lens_name(point, family) == word
    assert family in MODELS or family in VISUAL or family in VISUAL.values()


@pytest.mark.parametrize("family", VISUAL)
def test_a_tower_of_language_has_the_same_places_under_its_own_path(family):
    text, tower = FAMILIES[VISUAL[family]], FAMILIES[family]
    assert tower.places == text.places
    assert tower.blocks == "model.language_model.layers"


def test_what_has_no_path_and_what_has_no_word():
    assert module_path("blocks.3.ln2.hook_normalized", "gemma2") is None
    assert module_path("blocks.3.hook_resid_post.0", "llama") is None
    assert module_path("blocks.3.hook_resid_mid", "gpt_neox") is None
    assert module_path("blocks.3.hook_resid_post", "unknown") is None
    assert lens_name("model.layers.3.mlp:out", "gemma2") is None
    assert lens_name("model.layers.3.mlp:out", "llama") == "blocks.3.hook_mlp_out"
    assert lens_name("encoder.layers.3.mlp:out", "") is None
    assert lens_name("encoder.layers.3:out", "") == "blocks.3.hook_resid_post"
    assert lens_name("transformer.h.3:out", "llama") is None
    assert family_of("BertForMaskedLM") == ""


def test_hook_points_of_the_catalogue_come_back():
    n = 0
    for entry in every():
        if entry.hook_point and "mlp_in" not in entry.hook_name:
            assert lens_name(entry.hook_point, family_of_model(entry.model)) == entry.hook_name
            n += 1
    assert n > 10_000
