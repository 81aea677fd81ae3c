import pytest
import torch

from sae.steer.edits import Edit
from sae.steer.generation import generate
from sae.steer.steering import Steering


def test_the_text_is_the_most_likely_token_each_time(model, tokenizer):
    found = generate(model, tokenizer, "w3 w7 w9", max_new_tokens=11)
    assert found.prompt_tokens == (4, 8, 10)
    assert len(set(found.tokens)) > 2
    logits = model(torch.tensor([found.all_tokens]), use_cache=False).logits[0]
    assert logits[2:-1].argmax(-1).tolist() == list(found.tokens)
    assert found.text == " ".join(tokenizer.convert_ids_to_tokens(list(found.tokens)))


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
        found = generate(model, tokenizer, "w3 w7 w9", max_new_tokens=11)
    finally:
        tokenizer.eos_token = before
    assert found.tokens == whole.tokens[: whole.tokens.index(whole.tokens[4])]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_tokenizer_without_an_end_token_is_enough(model, tokenizer, use_cache):
    expected = generate(model, tokenizer, "w3 w7 w9", max_new_tokens=11)
    before = tokenizer.eos_token
    tokenizer.eos_token = None
    try:
        found = generate(model, tokenizer, "w3 w7 w9", max_new_tokens=11, use_cache=use_cache)
    finally:
        tokenizer.eos_token = before
    assert found.tokens[: len(expected.tokens)] == expected.tokens
    assert len(found.tokens) == 11


def test_each_token_is_steered_once_with_a_cache(model, tokenizer, placed):
    edits = [Edit(placed, latent=3, clamp=7.0)]
    with Steering(model, edits) as cached:
        generate(model, tokenizer, "w3 w7 w9", max_new_tokens=17)
    with Steering(model, edits) as whole:
        found = generate(model, tokenizer, "w3 w7 w9", max_new_tokens=17, use_cache=False)
    assert len(found.tokens) == 17
    # The last token is written and not read; the first is an attention sink.
    assert cached.counts[0].n_changed == 3 + 16 - 1
    assert whole.counts[0].n_changed == sum(3 + step - 1 for step in range(17))


def test_an_empty_prompt_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="prompt must have at least one token, got '  '"):
        generate(model, tokenizer, "  ")
