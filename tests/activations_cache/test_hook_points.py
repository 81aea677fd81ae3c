"""Every hook point that is offered can be captured, and the parts of a block add up to it."""

import pytest
import torch
import transformers
from torch import nn

from activations_cache.hooks import blocks_of, capture, hook_points_of

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
N_BLOCKS, D_MODEL = 3, 22

LANGUAGE = {"vocab_size": 31, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WIDE = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": 11,
    "intermediate_size": 29,
}
VISION = {**WIDE, "image_size": 21, "patch_size": 7}
GPT2 = {"n_embd": D_MODEL, "n_layer": N_BLOCKS, "n_head": 11, "n_positions": 17}
DINO = {name: value for name, value in VISION.items() if name != "intermediate_size"}

ADDING = {
    "Llama": ("LlamaForCausalLM", WIDE | LANGUAGE),
    "Mistral": ("MistralForCausalLM", WIDE | LANGUAGE | {"num_key_value_heads": 11}),
    "Qwen3": ("Qwen3ForCausalLM", WIDE | LANGUAGE | {"num_key_value_heads": 11, "head_dim": 2}),
    "GPT2": ("GPT2LMHeadModel", GPT2 | LANGUAGE),
    "GPTNeoX": ("GPTNeoXForCausalLM", WIDE | LANGUAGE),
    "ViT": ("ViTModel", VISION),
    "Dinov2": ("Dinov2Model", DINO),
    "Dinov2WithRegisters": ("Dinov2WithRegistersModel", DINO),
    "CLIPVision": ("CLIPVisionModel", VISION),
    "SiglipVision": ("SiglipVisionModel", VISION),
}
"""Families whose blocks add the attention's and the MLP's output to the stream as they are."""


def make(kind: str, config: str, settings: dict) -> nn.Module:
    torch.manual_seed(3)
    config_class = getattr(transformers, f"{config}Config")
    return getattr(transformers, kind)(config_class(**settings)).eval()


def inputs(model: nn.Module) -> torch.Tensor:
    if model.main_input_name == "input_ids":
        return IDS
    return torch.randn(2, 3, 21, 21, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", ADDING)
def test_a_block_is_what_its_attention_and_mlp_add(family: str):
    model = make(ADDING[family][0], family, ADDING[family][1])
    points = hook_points_of(model)
    assert len(points) == 5 * N_BLOCKS
    with capture(model, points) as run:
        seen = run(inputs(model))
    assert all(stream.shape[-1] == D_MODEL for stream in seen.values())
    for block in range(N_BLOCKS):
        before, attention, mlp_in, mlp_out, after = points[5 * block : 5 * block + 5]
        added = seen[attention] + seen[mlp_out]
        assert torch.allclose(seen[before] + added, seen[after], atol=1e-5)
        assert added.abs().max() > 1e-4
        assert not torch.allclose(seen[mlp_in], seen[after], atol=1e-3)
    assert torch.equal(seen[points[4]], seen[points[5]])
    assert torch.equal(seen[points[9]], seen[points[10]])


def test_an_encoder_that_normalises_after_adding_has_the_same_hook_points():
    model = make("BertForMaskedLM", "Bert", WIDE | LANGUAGE)
    points = hook_points_of(model)
    assert points[5:10] == [
        "bert.encoder.layer.1:in",
        "bert.encoder.layer.1.attention.output.dense:out",
        "bert.encoder.layer.1.intermediate:in",
        "bert.encoder.layer.1.output.dense:out",
        "bert.encoder.layer.1:out",
    ]
    with capture(model, points) as run:
        seen = run(IDS)
    layer = model.bert.encoder.layer[1]
    added = layer.attention.output.LayerNorm(seen[points[5]] + seen[points[6]])
    assert torch.allclose(added, seen[points[7]], atol=1e-5)
    after = layer.output.LayerNorm(added + seen[points[8]])
    assert torch.allclose(after, seen[points[9]], atol=1e-5)


def test_the_names_are_those_of_hook_points():
    points = hook_points_of(make("LlamaForCausalLM", "Llama", WIDE | LANGUAGE))
    assert points[:5] == [
        "model.layers.0:in",
        "model.layers.0.self_attn:out",
        "model.layers.0.mlp:in",
        "model.layers.0.mlp:out",
        "model.layers.0:out",
    ]


def test_an_unknown_block_has_its_in_and_out():
    model = nn.Sequential()
    model.add_module("stem", nn.Linear(5, 5))
    model.add_module("blocks", nn.ModuleList(nn.Linear(5, 5) for _ in range(2)))
    assert hook_points_of(model) == ["blocks.0:in", "blocks.0:out", "blocks.1:in", "blocks.1:out"]


def test_a_model_that_is_itself_the_list_has_paths_without_a_dot_in_front():
    assert hook_points_of(nn.Sequential(nn.Linear(5, 5))) == ["0:in", "0:out"]


def test_experts_inside_a_block_are_not_taken_for_blocks():
    block = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(5, 5) for _ in range(7))})
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    assert blocks_of(model)[0] == "layers"


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="model must have a list of blocks, got none in Linear"):
        hook_points_of(nn.Linear(3, 5))
