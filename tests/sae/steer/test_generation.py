import pytest
import torch

from activations_cache.probe import record_of
from sae.steer.edits import Edit, Push
from sae.steer.generation import generate
from sae.steer.steering import Steering
from tests.families import make


def test_the_text_is_the_most_likely_token_each_time(model, tokenizer):
    result = generate(model, tokenizer, "w3 w7 w9", max_new_tokens=11)
    assert result.prompt_tokens == (4, 8, 10)
    assert len(set(result.tokens)) > 2
    logits = model(torch.tensor([result.all_tokens]), use_cache=False).logits[0]
    assert logits[2:-1].argmax(-1).tolist() == list(result.tokens)
    assert result.text == " ".join(tokenizer.convert_ids_to_tokens(list(result.tokens)))


@pytest.mark.parametrize("first", [0, 1, 3, 5])
@pytest.mark.parametrize("steered", [False, True])
def test_the_cache_changes_no_token(model, tokenizer, placed, steered, first):
    edits = [Edit(placed, latent=3, clamp=7.0 if steered else 0.0)]

    def run(use_cache):
        with Steering(model, edits, first_position=first):
            return generate(model, tokenizer, "w3 w7 w9", max_new_tokens=17, use_cache=use_cache)

    assert run(True) == run(False)


def test_steering_changes_the_text(model, tokenizer, placed):
    base = generate(model, tokenizer, "w3 w7 w9", max_new_tokens=17)
    with Steering(model, [Edit(placed, latent=3, clamp=7.0)]):
        steered = generate(model, tokenizer, "w3 w7 w9", max_new_tokens=17)
    assert steered.tokens != base.tokens


def test_a_prompt_can_be_left_out_of_steering(model, tokenizer, placed):
    base = generate(model, tokenizer, "w3 w7 w9", max_new_tokens=1)
    with Steering(model, [Edit(placed, latent=3, clamp=7.0)], first_position=3):
        assert generate(model, tokenizer, "w3 w7 w9", max_new_tokens=1) == base


def test_the_end_token_ends_the_text(model, tokenizer):
    whole = generate(model, tokenizer, "w3 w7 w9", max_new_tokens=11)
    end = tokenizer.convert_ids_to_tokens(whole.tokens[4])
    before = tokenizer.eos_token
    tokenizer.eos_token = end
    try:
        result = generate(model, tokenizer, "w3 w7 w9", max_new_tokens=11)
    finally:
        tokenizer.eos_token = before
    assert result.tokens == whole.tokens[: whole.tokens.index(whole.tokens[4])]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_tokenizer_without_an_end_token_is_enough(model, tokenizer, use_cache):
    expected = generate(model, tokenizer, "w3 w7 w9", max_new_tokens=11)
    before = tokenizer.eos_token
    tokenizer.eos_token = None
    try:
        result = generate(model, tokenizer, "w3 w7 w9", max_new_tokens=11, use_cache=use_cache)
    finally:
        tokenizer.eos_token = before
    assert result.tokens[: len(expected.tokens)] == expected.tokens
    assert len(result.tokens) == 11


def test_each_token_is_steered_once_with_a_cache(model, tokenizer, placed):
    edits = [Edit(placed, latent=3, clamp=7.0)]
    with Steering(model, edits) as cached:
        generate(model, tokenizer, "w3 w7 w9", max_new_tokens=17)
    with Steering(model, edits) as whole:
        result = generate(model, tokenizer, "w3 w7 w9", max_new_tokens=17, use_cache=False)
    assert len(result.tokens) == 17
    # The last token is written and not read; the first is an attention sink.
    assert cached.counts[0].n_changed == 3 + 16 - 1
    assert whole.counts[0].n_changed == sum(3 + step - 1 for step in range(17))


def test_an_empty_prompt_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="prompt must have at least one token, got '  '"):
        generate(model, tokenizer, "  ")


def test_a_chat_is_what_the_template_makes_of_it(model, tokenizer):
    with pytest.raises(
        ValueError, match="chat must be false for a tokenizer without a chat template"
    ):
        generate(model, tokenizer, "w3 w7", chat=True)
    tokenizer.chat_template = "w1 {{ messages[0].content }} w2{{ ' w5' if add_generation_prompt }}"
    try:
        result = generate(model, tokenizer, "w3 w7", max_new_tokens=5, chat=True)
    finally:
        tokenizer.chat_template = None
    expected = generate(model, tokenizer, "w1 w3 w7 w2 w5", max_new_tokens=5)
    assert result.prompt_tokens == expected.prompt_tokens
    assert result.text == expected.text


def test_a_model_whose_state_changes_the_logits_is_run_without_one(tokenizer):
    """RWKV in transformers reads a prompt otherwise when it keeps a state."""
    model = make("Rwkv")
    assert record_of(model).cache_argument is None
    push = Push(
        "rwkv.blocks.1:out", 3 * torch.randn(24, generator=torch.Generator().manual_seed(0))
    )
    texts = []
    for use_cache in (True, False):
        with Steering(model, [push]) as steering:
            texts.append(generate(model, tokenizer, "w3 w7 w9", max_new_tokens=4,
                                  use_cache=use_cache).tokens)  # fmt: skip
        assert steering.n_tokens == 2 + 3 + 4 + 5
    assert texts[0] == texts[1]


def test_a_model_that_does_not_predict_the_next_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"must predict the next token .* BertForMaskedLM, whose"):
        generate(make("Bert"), tokenizer, "w3 w7")
