"""Steering a model that another object runs: an adapter's wrapper, TransformerLens' bridge."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from activations_cache.hooks import capture
from activations_cache.reading import given_cache, is_cache
from sae.steer.edits import Push
from sae.steer.steering import Steering
from tests.variants import Outer

VOCAB, WIDTH, POINT = 61, 24, "model.layers.1:out"
IDS = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(2))
VECTOR = 8 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
POLICIES = ["all", "prompt", "generated", "last"]


def llama():
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.4, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(3)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


class Block(nn.Module):
    """Stands in the place of a block, in the model and in the bridge."""

    def __init__(self, block):
        super().__init__()
        self._original_component = block

    def forward(self, *args, **kwargs):
        return self._original_component(*args, **kwargs)


class Bridge(nn.Module):
    """As the bridge of TransformerLens 4: its model is none of its modules, its blocks are.

    It takes text or tokens under a name of its own, makes the mask of texts of several lengths
    itself, gives bare logits, and keeps the cache to itself.
    """

    def __init__(self, model):
        super().__init__()
        layers = model.model.layers
        for i, block in enumerate(layers):
            layers[i] = Block(block)
        self.blocks = nn.ModuleList(layers)
        self.embed = model.model.embed_tokens
        self.__dict__["original_model"] = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original_model"], name)

    def forward(self, input, return_type="logits", attention_mask=None, **kwargs):
        if not isinstance(input, torch.Tensor):
            longest = max(map(len, input))
            rows = [[0] * (longest - len(text)) + [ord(c) - 96 for c in text] for text in input]
            input = torch.tensor(rows)
            attention_mask = (input > 0).long()
            kwargs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp_min(0)
        output = self.original_model(input, attention_mask=attention_mask, **kwargs)
        self._last = given_cache(self.original_model, output) if kwargs.get("use_cache") else {}
        return output.logits

    def generate(self, input, max_new_tokens=4, use_past_kv_cache=True, masks=False):
        cache = {}
        for _ in range(max_new_tokens):
            fresh = input[:, -1:] if cache else input
            mask = torch.ones_like(input) if masks else None
            logits = self(fresh, attention_mask=mask, use_cache=use_past_kv_cache, **cache)
            cache = self._last
            input = torch.cat([input, logits[:, -1:].argmax(-1)], dim=1)
        return input


def bare(policy):
    """What steering the model itself gives, and on how many tokens it ran."""
    model = llama()
    with Steering(model, [Push(POINT, VECTOR)], positions=policy) as steering:
        out = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False
        )
    return out.tolist(), steering.n_tokens


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("point", ["blocks.1:out", POINT])
def test_a_bridge_is_steered_as_the_model_in_it(policy, point):
    expected, n_tokens = bare(policy)
    for cached in (True, False):
        model = Bridge(llama())
        with Steering(model, [Push(point, VECTOR)], positions=policy) as steering:
            out = model.generate(IDS, use_past_kv_cache=cached)
        assert out.tolist() == expected
        if cached:
            assert steering.n_tokens == n_tokens
    assert expected != model.generate(IDS).tolist()


class Forgetful(nn.Module):
    """A block whose attention gets no cache on its way through a bridge."""

    def __init__(self, block):
        super().__init__()
        self._original_component = block

    def forward(self, *args, **kwargs):
        lost = {key: None for key, value in kwargs.items() if is_cache(value)}
        return self._original_component(*args, **{**kwargs, **lost})


@pytest.mark.parametrize(
    ("forgets", "error"),
    [
        ([1], "must be read without a KV cache in Bridge, which gives other logits with one"),
        ([0, 1, 2], "1 new tokens, 0 cached and a mask of 7"),
    ],
    ids=["one layer", "all layers"],
)
def test_a_bridge_that_loses_its_cache_is_refused_with_one(forgets, error):
    model = Bridge(llama())
    layers = model.original_model.model.layers
    for i in forgets:
        layers[i] = model.blocks[i] = Forgetful(layers[i])
    push = [Push("blocks.2:out", VECTOR)]
    with pytest.raises(ValueError, match=error), Steering(model, push):
        model.generate(IDS, masks=True)
    with Steering(model, push) as steering:
        model.generate(IDS, use_past_kv_cache=False)
    assert steering.n_tokens == 2 * (5 + 6 + 7 + 8)


def test_texts_that_a_bridge_pads_itself_are_steered_where_they_begin():
    model, texts = Bridge(llama()), ["cheese", "ham"]
    for first in (0, 1):
        push = [Push("blocks.1:out", VECTOR)]
        with Steering(model, push, first_position=first) as steering:
            both = model(texts)
        assert steering.n_tokens == 9 - 2 * first
        with Steering(model, push, first_position=first):
            alone = model(texts[1:])
        assert torch.allclose(both[1, 3:], alone[0], atol=1e-4)


def test_a_bridge_gives_rows_at_its_own_names_and_at_the_models():
    model = Bridge(llama())
    with capture(model, ["blocks.1:out", POINT]) as run:
        result = run(IDS)
    with capture(llama(), [POINT]) as run:
        expected = run(IDS)[POINT]
    assert all(torch.equal(stream, expected) for stream in result.values())


def test_bare_logits_that_are_not_finite_are_an_error():
    model = Bridge(llama())
    model.original_model.lm_head.weight[3] = torch.inf
    with (
        pytest.raises(ValueError, match=r"logits must be finite, got others in Bridge"),
        Steering(model, [Push("blocks.1:out", VECTOR)]),
    ):
        model(IDS)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_model_in_peft_is_steered_as_it_is_bare(policy):
    expected, n_tokens = bare(policy)
    wrapped = Outer(llama()).eval()
    point = f"base_model.model.{POINT}"
    with Steering(wrapped, [Push(point, VECTOR)], positions=policy) as steering:
        out = wrapped.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False
        )
    assert out.tolist() == expected
    assert steering.n_tokens == n_tokens
