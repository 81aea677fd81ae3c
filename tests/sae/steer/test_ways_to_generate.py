"""Steering in the ways to generate that try tokens, guide them, or read many prompts at once."""

import copy

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from activations_cache.reading import given_cache
from sae.steer.edits import Edit, Push
from sae.steer.steering import Steering
from tests.families import custom_hooks
from tests.sae.steer.test_in_generation import (
    D_MODEL,
    LENGTHS,
    N_NEW,
    VOCAB,
    dictionary_of,
    generated,
    llama,
    steered,
)

POLICIES = ["all", "prompt", "generated", "last"]


@pytest.fixture
def prompts():
    ids = torch.randint(1, VOCAB, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0] * (7 - n) + [1] * n for n in LENGTHS])
    return {"input_ids": ids * mask, "attention_mask": mask}


def contrastive(model, input_ids, logits_processor, stopping_criteria, generation_config, **more):
    """A search that reads several next tokens on top of one cache and goes on with one of them."""
    cache, ids = {}, input_ids
    while ids.shape[1] < generation_config.max_length:
        if generation_config.use_cache:
            fresh = ids[:, -1:] if cache else ids
            output = model(input_ids=fresh, use_cache=True, output_hidden_states=True, **cache)
            cache = given_cache(model, output)
        else:
            output = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        log_p, next_ids = output.logits[:, -1].log_softmax(-1).topk(3)
        both = torch.cat([ids.repeat(3, 1), next_ids.T], dim=1)
        if cache:
            tried = {name: copy.deepcopy(value) for name, value in cache.items()}
            next(iter(tried.values())).batch_repeat_interleave(3)
            seen = model(input_ids=next_ids.T, use_cache=True, output_hidden_states=True, **tried)
        else:
            seen = model(input_ids=both, use_cache=False, output_hidden_states=True)
        new, old = seen.hidden_states[-1][:, -1], output.hidden_states[-1][0, -1]
        likeness = torch.cosine_similarity(new, old[None])
        ids = both[(log_p[0] - 2 * likeness).argmax()][None]
    return ids


def small():
    torch.manual_seed(9)
    return llama()[0].eval().requires_grad_(False)


SPECULATIVE = {
    "an assistant": lambda _: {"assistant_model": small()},
    "itself": lambda model: {"assistant_model": model},
    # transformers 5.10 asks for an end; the model never gives this one
    "the prompt's own words": lambda _: {"prompt_lookup_num_tokens": 3, "eos_token_id": 10**6},
    "early exit": lambda _: {"assistant_early_exit": 2},
    "contrastive search": lambda _: {"custom_generate": contrastive},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", SPECULATIVE)
def test_tokens_that_are_tried_and_dropped_change_no_steered_text(policy, way):
    torch.manual_seed(3)
    model, hook_point = llama()
    model.eval().requires_grad_(False)
    ids = torch.randint(1, VOCAB, (1, 7), generator=torch.Generator().manual_seed(2))
    options = SPECULATIVE[way](model)
    # A draft that is checked gives what greedy choice gives; a search of its own is run twice.
    plain = {name: value for name, value in options.items() if name == "custom_generate"}

    def text(**options):
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_NEW, min_new_tokens=N_NEW,
            pad_token_id=0, do_sample=False, **options,
        ).tolist()  # fmt: skip

    edits = [Edit(dictionary_of(hook_point), latent=5, clamp="1.5x norm")]
    with Steering(model, edits, positions=policy):
        result = text(**options)
    with Steering(model, edits, positions=policy):
        whole = text(use_cache=False, **plain)
    assert result == whole
    assert result != text(**options)


@pytest.mark.parametrize(
    "options", [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "high"},
                {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}],
    ids=["contrastive", "dola", "groups of beams"],
)  # fmt: skip
def test_ways_that_transformers_has_given_away_are_refused_by_it(prompts, options):
    """They run code from a hub; steering leaves the model as it was."""
    model, hook_point = llama()
    subject = model.eval().requires_grad_(False), dictionary_of(hook_point)
    with pytest.raises(ValueError, match="trust_remote_code"):
        steered(subject, prompts, "all", **options)
    assert not custom_hooks(model)


GUIDANCE = {"guidance_scale": 1.5}
NEGATIVE = {**GUIDANCE, "negative_prompt_ids": torch.tensor([[5, 6, 7], [9, 9, 1], [2, 4, 8]])}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("options", [GUIDANCE, NEGATIVE], ids=["guidance", "negative-prompt"])
def test_guidance_is_steered_alike_with_and_without_a_cache(prompts, policy, options):
    torch.manual_seed(3)
    model, hook_point = llama()
    subject = model.eval().requires_grad_(False), dictionary_of(hook_point)
    result, _ = steered(subject, prompts, policy, **options)
    whole, _ = steered(subject, prompts, policy, use_cache=False, **options)
    assert result == whole
    assert result != generated(model, prompts, **options)


def packed(model, ids, config):
    sizes = ContinuousBatchingConfig(num_blocks=16, block_size=32, max_batch_tokens=64)
    prompts = [row.tolist() for row in ids]
    return model.generate_batch(prompts, generation_config=config, continuous_batching_config=sizes)


@pytest.mark.parametrize("policy", ["prompt", "generated", "last"])
def test_a_packed_batch_does_not_show_its_prompts(policy):
    """Transformers keeps the error in its results; the context raises it again."""
    model, hook_point = llama()
    model.eval().requires_grad_(False)
    push = [Push(hook_point, torch.ones(D_MODEL))]
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with (
        pytest.raises(ValueError, match=f"positions must be all, .* got {policy}"),
        Steering(model, push, positions=policy),
    ):
        packed(model, torch.tensor([[3, 9, 27], [5, 8, 13]]), config)
    assert not custom_hooks(model)


def test_prompts_that_a_batch_packs_into_one_row_are_steered_each_by_itself():
    torch.manual_seed(3)
    model, hook_point = llama()
    model.eval().requires_grad_(False)
    push = [Push(hook_point, 3 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0)))]
    ids = torch.randint(1, VOCAB, (2, 6), generator=torch.Generator().manual_seed(2))
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with Steering(model, push) as steering:
        out = packed(model, ids, config)
    assert steering.n_tokens == 2 * (5 + 3)
    with Steering(model, push):
        alone = model.generate(ids, attention_mask=ids != 0, generation_config=config)
    assert [o.generated_tokens for o in out.values()] == alone[:, 6:].tolist()
