"""What counts as prompt, in forwards and in generation."""

import pytest
import torch

from activations_cache.prompts import prompts_of
from activations_cache.reading import given_cache

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def last_block(model):
    return "model.layers.3:out" if hasattr(model, "model") else "transformer.h.3:out"


def seen(prompts, n_examples=2):
    result = prompts.of(n_examples)
    return result.n_padding.tolist(), result.n_tokens.tolist(), result.is_whole


def test_a_forward_is_a_prompt_and_what_follows_a_cache_continues_it(causal_model):
    with prompts_of(causal_model, last_block(causal_model)) as prompts:
        assert prompts.of(2) is None
        first = causal_model(MASK + 3, attention_mask=MASK, use_cache=True)
        assert seen(prompts) == ([2, 0], [3, 5], True)
        longer = torch.cat([MASK, MASK[:, -1:]], dim=1)
        cache = given_cache(causal_model, first)
        causal_model(MASK[:, :1] + 3, attention_mask=longer, use_cache=True, **cache)
        assert seen(prompts) == ([2, 0], [3, 5], False)
        causal_model(MASK[:1, :4] + 3)
        assert seen(prompts, 1) == ([0], [4], True)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_generation_keeps_its_prompt(causal_model, named, use_cache):
    arguments = ((), {"input_ids": MASK + 3}) if named else ((MASK + 3,), {})
    with prompts_of(causal_model, last_block(causal_model)) as prompts:
        causal_model.generate(
            *arguments[0], **arguments[1], attention_mask=MASK, max_new_tokens=5, num_beams=3,
            use_cache=use_cache, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert seen(prompts, 6) == ([2, 2, 2, 0, 0, 0], [3, 3, 3, 5, 5, 5], False)


def test_a_mask_that_generate_infers_is_seen(causal_model):
    with prompts_of(causal_model, last_block(causal_model)) as prompts:
        causal_model.generate(MASK * 7, max_new_tokens=3, pad_token_id=0, eos_token_id=1)
        assert seen(prompts) == ([2, 0], [3, 5], False)


def test_a_vision_model_has_no_prompt(vit_model):
    with prompts_of(vit_model, "embeddings:out") as prompts:
        vit_model(torch.zeros(2, 3, 21, 21))
        assert prompts.of(2) is None
    assert not any(m._forward_pre_hooks for m in vit_model.modules())
