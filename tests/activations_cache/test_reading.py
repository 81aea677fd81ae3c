"""Positions follow from what a model is given, whatever its arguments are called."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    StaticCache,
)

from activations_cache.hooks import edit
from activations_cache.prompts import prompts_of
from activations_cache.reading import given_cache, is_cache, parameters_of, takes_tokens

IDS = torch.tensor([[3, 9, 27, 11, 5]])
SMALL = {"vocab_size": 61, "hidden_size": 24, "pad_token_id": 0, "bos_token_id": None}


class Memory:
    """A cache that no library has: it keeps rows and says how many."""

    def __init__(self):
        self.rows: list[Tensor] = []

    def get_seq_length(self) -> int:
        return sum(rows.shape[1] for rows in self.rows)


class Toy(nn.Module):
    """Takes ids and a cache under a name that nobody knows."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(61, 24)
        self.block = nn.Linear(24, 24)

    def forward(self, ids: Tensor, remembered: Memory | None = None) -> dict:
        remembered = Memory() if remembered is None else remembered
        stream = self.block(self.table(ids))
        remembered.rows.append(stream)
        return {"logits": stream, "remembered": remembered}


class Hiding(nn.Module):
    """Keeps the cache of its model from who calls it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.kept = model, {}

    def forward(self, input_ids: Tensor) -> Tensor:
        output = self.model(input_ids, use_cache=True, **self.kept)
        self.kept = given_cache(self.model, output)
        return output.logits


def llama():
    config = LlamaConfig(
        **SMALL, eos_token_id=None, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def positions_in(model: nn.Module, hook_point: str, run) -> list:
    seen = []
    with torch.no_grad(), edit(model, {hook_point: lambda h, p: seen.append(p.tolist()) or h}):
        run()
    return seen


def test_a_cache_under_another_name_counts():
    model = Toy()

    def run():
        cache = given_cache(model, model(IDS))
        assert list(cache) == ["remembered"]
        model(IDS[:, :2], **cache)
        model(IDS[:, :1], *cache.values())

    assert positions_in(model, "block:out", run) == [[[0, 1, 2, 3, 4]], [[5, 6]], [[7]]]


def test_a_cache_that_a_wrapper_hides_counts():
    model = Hiding(llama())
    where = "model.model.layers.1:out"
    with prompts_of(model, where) as prompts:
        seen = positions_in(model, where, lambda: [model(IDS), model(IDS[:, :1])])
        result = prompts.of(1)
    assert seen == [[[0, 1, 2, 3, 4]], [[5]]]
    assert result is not None
    assert (result.n_tokens.tolist(), result.is_whole) == ([5], False)


def test_a_model_inside_another_may_be_called_alone():
    model = Hiding(llama())
    seen = positions_in(
        model, "model.model.layers.1:out",
        lambda: model.model.generate(IDS, max_new_tokens=3, do_sample=False),
    )  # fmt: skip
    assert seen == [[[0, 1, 2, 3, 4]], [[5]], [[6]]]


def test_a_state_without_a_length_is_counted():
    config = MambaConfig(**SMALL, eos_token_id=None, num_hidden_layers=2, state_size=4)
    model = MambaForCausalLM(config).eval()
    generate = lambda: model.generate(IDS, max_new_tokens=3, do_sample=False)  # noqa: E731
    seen = positions_in(model, "backbone.layers.1:out", generate)
    assert seen == [[[0, 1, 2, 3, 4]], [[5]], [[6]]]


def test_a_state_that_nobody_counted_is_refused():
    config = RwkvConfig(
        **SMALL, eos_token_id=None, num_hidden_layers=2, attention_hidden_size=24,
        intermediate_size=37,
    )  # fmt: skip
    model = RwkvForCausalLM(config).eval()
    state = model(IDS, use_cache=True).state
    with pytest.raises(ValueError, match=r"the positions at rwkv.blocks.1:out must follow .*Rwkv"):
        positions_in(model, "rwkv.blocks.1:out", lambda: model(IDS[:, :1], state=state))


def test_a_decoder_counts_its_own_tokens():
    config = BartConfig(
        vocab_size=61, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=37, decoder_ffn_dim=37,
        max_position_embeddings=67, forced_eos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    mask = torch.tensor([[0, 0, 1, 1, 1]])

    def generate():
        model.generate(IDS, attention_mask=mask, max_new_tokens=3, do_sample=False)

    where = "model.decoder.layers.0:out"
    with prompts_of(model, where) as prompts:
        assert positions_in(model, where, generate) == [[[0]], [[1]], [[2]]]
        result = prompts.of(1)
    assert result is not None
    assert (result.n_tokens.tolist(), result.is_whole) == ([1], False)
    where = "model.encoder.layers.0:out"
    with prompts_of(model, where) as prompts:
        assert positions_in(model, where, generate) == [[[-2, -1, 0, 1, 2]]]
        result = prompts.of(1)
    assert result is not None
    assert (result.n_tokens.tolist(), result.is_whole) == ([3], True)


def test_a_block_called_without_its_model_is_refused():
    model = llama()
    with pytest.raises(
        ValueError, match="got 3 tokens in no call of LlamaForCausalLM or LlamaModel"
    ):
        positions_in(model, "model.norm:out", lambda: model.model.norm(torch.zeros(1, 3, 24)))


def test_a_mask_of_more_tokens_than_are_known_is_refused():
    model = llama()
    mask = torch.ones(1, 9, dtype=torch.long)
    with pytest.raises(ValueError, match="5 new tokens, 0 cached and a mask of 9"):
        positions_in(model, "model.layers.1:out", lambda: model(IDS, attention_mask=mask))


def test_a_growing_cache_that_has_lost_its_tokens_is_refused():
    """As where a wrapper's attention does not write into the cache that it is given."""
    model, mask = llama(), torch.ones(1, 6, dtype=torch.long)
    (name,) = given_cache(model, model(IDS, use_cache=True))
    run = lambda: model(IDS[:, :1], attention_mask=mask, **{name: DynamicCache()})  # noqa: E731
    with pytest.raises(ValueError, match="1 new tokens, 0 cached and a mask of 6"):
        positions_in(model, "model.layers.1:out", run)


def test_a_cache_with_room_may_have_a_wider_mask():
    model, mask = llama(), torch.ones(1, 9, dtype=torch.long)
    mask[:, 5:] = 0
    (name,) = given_cache(model, model(IDS, use_cache=True))
    cache = StaticCache(config=model.config, max_cache_len=9)
    run = lambda: model(IDS, attention_mask=mask, **{name: cache})  # noqa: E731
    assert positions_in(model, "model.layers.1:out", run) == [[[0, 1, 2, 3, 4]]]


class Wrapped(nn.Module):
    """Takes whatever its one part takes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.model(*args, **kwargs)


def test_a_wrapper_without_names_takes_what_its_part_takes():
    model = Wrapped(Wrapped(llama()))
    assert parameters_of(model)[:2] == ["input_ids", "attention_mask"]
    assert takes_tokens(model)
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    where = "model.model.model.layers.1:out"
    assert positions_in(model, where, lambda: model(IDS, mask)) == [[[-2, -1, 0, 1, 2]]]
    assert parameters_of(nn.Linear(2, 2)) == ["input"]


def test_logits_of_the_last_token_alone_are_refused():
    """The head sees one row of five, and nothing says which."""
    model = llama()
    with pytest.raises(ValueError, match=r"got 1 tokens in .*LlamaForCausalLM with 5 new tokens"):
        positions_in(model, "lm_head:in", lambda: model(IDS, logits_to_keep=1))


def test_what_is_a_cache():
    assert is_cache(DynamicCache())
    assert is_cache(Memory())
    assert not any(map(is_cache, (None, IDS, {}, [IDS], (IDS,), nn.Linear(1, 1))))


def test_a_model_that_gives_a_cache_must_take_one():
    with pytest.raises(ValueError, match="must come back as remembered"):
        given_cache(nn.Linear(2, 2), {"remembered": Memory()})
    assert given_cache(nn.Linear(2, 2), {"logits": IDS}) == {}
