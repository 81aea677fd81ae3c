"""Steering in `generate`: the same tokens with and without a KV cache, and counted exactly."""

import contextlib
import copy
import logging

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from activations_cache.reading import given_cache
from sae.architecture import ReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.steer.edits import Edit
from sae.steer.steering import Steering
from tests.families import custom_hooks

VOCAB, D_MODEL, N_NEW = 43, 24, 9
LENGTHS = (7, 3, 5)
MASK = torch.tensor([[0, 1, 0, 1, 1, 0, 1], [1] * 7, [1, 1, 1, 0, 1, 0, 1]], dtype=torch.bool)
POLICIES = {
    "all": "all",
    "prompt": "prompt",
    "generated": "generated",
    "last": "last",
    "mask": MASK,
}


def gpt2():
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=D_MODEL, n_layer=3, n_head=2, n_positions=67,
        initializer_range=0.4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config), "transformer.h.1:out"


def llama():
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=D_MODEL, intermediate_size=37, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.4,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config), "model.layers.1:out"


def gemma():
    """With layers that see a window of 5 tokens, and logits that are capped."""
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=D_MODEL, intermediate_size=37, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=12, initializer_range=0.4,
        sliding_window=5, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config), "model.layers.1:out"


def dictionary_of(hook_point, d_model=D_MODEL, activation=None):
    config = SAEConfig(d_in=d_model, d_sae=53, activation=activation or TopK(k=7))
    dictionary = SparseAutoencoder(config)
    initialise(dictionary, torch.Generator().manual_seed(1))
    return dictionary.requires_grad_(False).at(hook_point)


@pytest.fixture(
    scope="module",
    params=[(gpt2, torch.float32), (llama, torch.bfloat16), (gemma, torch.bfloat16)],
    ids=["gpt2", "llama-bf16", "gemma-bf16"],
)
def subject(request):
    make, dtype = request.param
    torch.manual_seed(3)
    model, hook_point = make()
    return model.to(dtype).eval().requires_grad_(False), dictionary_of(hook_point)


@pytest.fixture
def prompts():
    ids = torch.randint(1, VOCAB, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0] * (7 - n) + [1] * n for n in LENGTHS])
    return {"input_ids": ids * mask, "attention_mask": mask}


def generated(model, prompts, **options):
    return with_logits(model, prompts, **options)[0]


def with_logits(model, prompts, **options):
    """The texts, and the logits of each of their new tokens."""
    result = model.generate(
        **prompts, max_new_tokens=N_NEW, min_new_tokens=N_NEW, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
        **{"do_sample": False, **options},
    )  # fmt: skip
    return result.sequences.tolist(), torch.stack(result.logits, dim=1).to(model.dtype)


def steered(subject, prompts, positions, edit_words=None, first=1, **options):
    text, _, steering = steered_logits(subject, prompts, positions, edit_words, first, **options)
    return text, steering


def steered_logits(subject, prompts, positions, edit_words=None, first=1, **options):
    model, placed = subject
    edits = [Edit(placed, latent=5, **(edit_words or {"clamp": "1.5x norm"}))]
    with Steering(model, edits, positions=positions, first_position=first) as steering:
        return *with_logits(model, prompts, **options), steering


def assert_same_text(result, expected, logits):
    """Equal tokens, or a tie of the expected run: its two logits are the same to two roundings."""
    eps = torch.finfo(logits.dtype).eps
    for row, (one, other) in enumerate(zip(result, expected, strict=True)):
        step = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        if step is not None:
            n_prompt = len(other) - logits.shape[1]
            first, second = logits[row, step - n_prompt, [one[step], other[step]]].tolist()
            assert step >= n_prompt
            assert abs(first - second) <= 2 * eps * max(abs(first), abs(second))


def n_chosen(policy, first, n_fed):
    """Tokens that a policy chooses when each token is read once, by hand."""
    n_after = n_fed - 1  # the last token is never read
    if policy == "generated":
        return len(LENGTHS) * n_after
    if policy == "last":
        return sum(n > first for n in LENGTHS)
    if policy == "mask":
        mask_of_prompts = torch.tensor([[c >= 7 - n + first for c in range(7)] for n in LENGTHS])
        return int((MASK & mask_of_prompts).sum())
    prompt = sum(max(n - first, 0) for n in LENGTHS)
    return prompt + (len(LENGTHS) * n_after if policy == "all" else 0)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("policy", POLICIES)
def test_cached_and_uncached_generation_agree(subject, prompts, policy, first):
    base = generated(subject[0], prompts)
    cached, steering = steered(subject, prompts, POLICIES[policy], first=first)
    whole, logits, recount = steered_logits(
        subject, prompts, POLICIES[policy], first=first, use_cache=False
    )
    assert_same_text(cached, whole, logits)
    assert cached != base
    assert steering.n_tokens == n_chosen(policy, first, N_NEW)
    times = N_NEW if policy in ("prompt", "last", "mask") else None
    assert times is None or recount.n_tokens == times * steering.n_tokens
    assert steering.counts[0].n_changed == steering.n_tokens
    # bfloat16 rounds the stream after it was moved
    assert steering.counts[0].relative_size == pytest.approx(1.5, rel=0.2)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}],
    ids=["beams", "static", "chunks"],
)  # fmt: skip
def test_other_ways_to_generate_agree(prompts, policy, options):
    torch.manual_seed(3)
    model, hook_point = llama()
    subject = model.eval().requires_grad_(False), dictionary_of(hook_point)
    beams = {k: v for k, v in options.items() if k == "num_beams"}
    result, steering = steered(subject, prompts, POLICIES[policy], **options)
    whole, _ = steered(subject, prompts, POLICIES[policy], use_cache=False, **beams)
    assert result == whole
    assert result != generated(model, prompts, **beams)
    assert steering.n_tokens == n_chosen(policy, 1, N_NEW) * options.get("num_beams", 1)


def test_a_padded_prompt_is_steered_as_it_is_alone(subject, prompts):
    cached, _ = steered(subject, prompts, "generated")
    for row, n in enumerate(LENGTHS):
        alone = {name: values[row : row + 1, 7 - n :] for name, values in prompts.items()}
        text, logits, _ = steered_logits(subject, alone, "generated")
        assert_same_text([cached[row][7 - n :]], text, logits)


@pytest.mark.parametrize("policy", POLICIES)
def test_zero_strength_is_bit_identical(subject, prompts, policy):
    model, placed = subject
    base = model(**prompts).logits
    for words in ({"add": 0.0}, {"scale": 1.0}, {"add": "0x norm"}):
        with Steering(model, [Edit(placed, latent=5, **words)], positions=POLICIES[policy]):
            assert torch.equal(model(**prompts).logits, base)


def test_in_a_plain_forward_everything_is_prompt(subject, prompts):
    model, placed = subject
    right = {name: values.flip(1) for name, values in prompts.items()}
    for policy, expected in (("all", 12), ("prompt", 12), ("last", 3), ("generated", 0)):
        with Steering(model, [Edit(placed, latent=5, clamp=9.0)], positions=policy) as steering:
            model(**right)
        assert steering.n_tokens == expected  # right padding is not counted


def test_what_is_read_on_top_of_a_cache_is_generated(subject, prompts):
    model, placed = subject
    ids = prompts["input_ids"][:1]
    with Steering(model, [Edit(placed, latent=5, clamp=9.0)], positions="generated") as steering:
        cache = given_cache(model, model(ids, use_cache=True))
        assert steering.n_tokens == 0
        model(ids[:, :2], use_cache=True, **cache)
    assert steering.n_tokens == 2


def test_an_edit_that_never_ran_is_reported_in_one_line(subject, prompts, caplog):
    model, placed = subject
    edits = [Edit(placed, latent=5, clamp=9.0)]
    with caplog.at_level(logging.WARNING), Steering(model, edits, positions="generated"):
        model(**prompts)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        f"clamp of latent 5 at {placed.config.hook_point_out} ran on none of 21 tokens"
    )
    assert "positions 'generated' from 1 on" in line
    caplog.clear()
    with caplog.at_level(logging.WARNING), contextlib.suppress(KeyError), Steering(model, edits):
        raise KeyError
    assert not caplog.records


@pytest.mark.parametrize("policy", ["all", "generated"])
def test_an_edit_whose_place_was_never_passed_is_an_error(subject, policy):
    model, placed = subject
    said = r"ran on none of 0 tokens .* torch.compile leaves hooks"
    with pytest.raises(ValueError, match=said), Steering(model, [Edit(placed, latent=5, clamp=9.0)],
                                                         positions=policy):  # fmt: skip
        pass
    assert not custom_hooks(model)


def test_an_edit_that_rounding_undoes_is_an_error(subject, prompts):
    model, placed = subject
    with (
        pytest.raises(ValueError, match=r"must change the stream, got the same at all \d+ tokens"),
        Steering(model, [Edit(placed, latent=5, add=1e-12)]),
    ):
        model(**prompts)


def test_a_stream_beyond_its_number_format_is_an_error_with_its_strength(prompts):
    torch.manual_seed(3)
    model, hook_point = llama()
    model.half().eval().requires_grad_(False)
    edits = [Edit(dictionary_of(hook_point), latent=5, add=1e6)]
    with (
        pytest.raises(
            ValueError, match=r"finite in float16 at model.layers.1:out, .* latent 5 .* to 1e\+06"
        ),
        Steering(model, edits),
    ):
        model(**prompts)


def test_logits_that_are_not_finite_are_an_error(prompts):
    torch.manual_seed(3)
    model, hook_point = llama()
    model.eval().requires_grad_(False)
    model.lm_head.weight[3] = torch.inf
    with (
        pytest.raises(ValueError, match=r"logits must be finite, .* LlamaForCausalLM under clamp"),
        Steering(model, [Edit(dictionary_of(hook_point), latent=5, clamp=9.0)]),
    ):
        model(**prompts)


def test_hidden_states_show_a_changed_block_as_it_was_and_later_ones_changed(subject, prompts):
    model, placed = subject
    base = model(**prompts, output_hidden_states=True).hidden_states
    with Steering(model, [Edit(placed, latent=5, clamp="2x norm")]):
        result = model(**prompts, output_hidden_states=True).hidden_states
    assert torch.equal(result[2], base[2])  # behind block 1, which is changed
    assert not torch.equal(result[3], base[3])


def test_hooks_and_generate_are_put_back_after_an_error(subject, prompts):
    model, placed = subject

    def fail():
        with Steering(model, [Edit(placed, latent=5, clamp=9.0)]):
            assert "generate" in vars(model)
            generated(model, prompts)
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail()
    assert not custom_hooks(model)
    assert "generate" not in vars(model)


def test_nested_steerings_each_know_the_prompt(subject, prompts):
    model, placed = subject
    edits = [Edit(placed, latent=5, clamp=9.0)]
    with Steering(model, edits, positions="generated") as outer:
        with Steering(model, edits, positions="prompt") as inner:
            generated(model, prompts)
        generated(model, prompts)
    assert (outer.n_tokens, inner.n_tokens) == (2 * 3 * (N_NEW - 1), 12)


def test_several_dictionaries_and_layers_apply_in_order(subject, prompts):
    model, placed = subject
    before = dictionary_of(placed.hook_point.replace("1", "0"))
    other = dictionary_of(placed.hook_point, activation=ReLU())
    first, second = Edit(before, latent=5, clamp=9.0), Edit(placed, latent=5, clamp=9.0)
    third = Edit(other, latent=7, ablate=True)
    with Steering(model, [third, first, second]) as steering:
        both = model(**prompts).logits
    with Steering(model, [third]), Steering(model, [first]), Steering(model, [second]):
        assert torch.equal(model(**prompts).logits, both)
    with Steering(model, [first, second, third]):
        assert not torch.equal(model(**prompts).logits, both)
    assert [count.n_chosen for count in steering.counts] == [12, 12, 12]


@pytest.mark.real
@pytest.mark.parametrize("policy", ["all", "prompt", "generated", "last"])
def test_cached_and_uncached_generation_agree_on_smollm2(smollm2_float32, policy):
    model, tokenizer = smollm2_float32
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    prompts = dict(
        tokenizer(["The weather", "When she came home, she"], return_tensors="pt", padding=True)
    )
    placed = dictionary_of("model.layers.15:out", d_model=576)
    outs = []
    for use_cache in (True, False):
        with Steering(model, [Edit(placed, latent=5, clamp="0.7x norm")], positions=policy):
            outs.append(
                model.generate(**prompts, max_new_tokens=4, do_sample=False, use_cache=use_cache)
            )
    assert outs[0].tolist() == outs[1].tolist()
    base = model.generate(**prompts, max_new_tokens=4, do_sample=False)
    assert outs[0].tolist() != base.tolist()
