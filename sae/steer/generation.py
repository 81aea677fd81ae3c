"""Greedy continuation of a prompt, one token at a time, so that base and steered text compare."""

from dataclasses import dataclass

import torch
from torch import nn

from activations_cache.models import Tokenizer
from activations_cache.probe import record_of, require_next_token
from activations_cache.reading import given_cache
from monosema.checks import MonosemaError


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A continuation, with what it depends on."""

    prompt: str
    """The text that was given."""
    text: str
    """The continuation, without the prompt."""
    prompt_tokens: tuple[int, ...]
    """Token ids of the prompt."""
    tokens: tuple[int, ...]
    """Token ids of the continuation, without the end token."""
    max_new_tokens: int
    """Length asked for; the continuation is shorter where the model ended it."""

    @property
    def all_tokens(self) -> tuple[int, ...]:
        """Token ids of prompt and continuation."""
        return self.prompt_tokens + self.tokens


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 40,
    use_cache: bool = True,
    chat: bool = False,
) -> Generation:
    """Continue a prompt with the most likely token each time, until the end token.

    Inside `Steering` this gives the steered text. There is no sampling and no penalty: what is
    seen is the model and the operations alone.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: The model's; it decides whether the prompt gets special tokens.
        prompt: The text.
        max_new_tokens: Tokens at most.
        use_cache: Keep keys and values of earlier positions; the text is the same without. A model
            whose logits differ with a cache is run without one.
        chat: Whether the prompt is what a user says, which the tokenizer's chat template puts into
            the form that the model was trained on, up to where its answer begins.

    Raises:
        ValueError: If the prompt has no tokens, the tokenizer no chat template, or the model does
            not predict the next token.
    """
    options = {"max_new_tokens": max_new_tokens, "use_cache": use_cache, "chat": chat}
    (found,) = generate_copies(model, tokenizer, prompt, 1, **options)
    return found


def generate_copies(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    n_copies: int,
    *,
    max_new_tokens: int = 40,
    use_cache: bool = True,
    chat: bool = False,
) -> list[Generation]:
    """Continue several copies of a prompt side by side, in a context that steers each otherwise.

    A batch costs little more than one text, but in bfloat16 its sums round otherwise, so a text
    may differ from the one that `generate` gives. The arguments are those of `generate`.

    Raises:
        ValueError: For the same reasons.
    """
    require_next_token(model, "to continue a text")
    prompt_tokens = tuple(_chat_ids(tokenizer, prompt) if chat else tokenizer(prompt)["input_ids"])
    if not prompt_tokens:
        raise MonosemaError(f"prompt must have at least one token, got {prompt!r}")
    copies = [list(prompt_tokens) for _ in range(n_copies)]
    end = tokenizer.eos_token_id
    assert end is None or isinstance(end, int), end
    is_cached = use_cache and record_of(model).cache_argument is not None
    rows = _greedy(model, copies, end, max_new_tokens, is_cached)
    return [
        Generation(
            prompt=prompt,
            text=str(tokenizer.decode(row)),
            prompt_tokens=prompt_tokens,
            tokens=tuple(row),
            max_new_tokens=max_new_tokens,
        )
        for row in rows
    ]


def _chat_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of what a user says, with all that the template puts around it."""
    if tokenizer.chat_template is None:
        raise MonosemaError(
            "chat must be false for a tokenizer without a chat template, got true; write the "
            "prompt as the model knows it"
        )
    said = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return tokenizer(str(text), add_special_tokens=False)["input_ids"]  # the template has them


@torch.no_grad()
def _greedy(
    model: nn.Module, prompts: list[list[int]], end: int | None, n_tokens: int, use_cache: bool
) -> list[list[int]]:
    """The continuations of prompts of one length, each up to its end token."""
    device = next(model.parameters()).device
    whole = torch.tensor(prompts, device=device)
    n_prompt, cache = whole.shape[1], {}
    fresh = whole
    while whole.shape[1] < n_prompt + n_tokens:
        output = model(input_ids=fresh, use_cache=use_cache, **cache)
        chosen = output.logits[:, -1].argmax(dim=1, keepdim=True)
        whole = torch.cat([whole, chosen], dim=1)
        if end is not None and bool((whole[:, n_prompt:] == end).any(dim=1).all()):
            break
        cache = given_cache(model, output) if use_cache else {}
        fresh = chosen if cache else whole
    rows = whole[:, n_prompt:].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
