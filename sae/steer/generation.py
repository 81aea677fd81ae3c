"""Greedy continuation of a prompt, one token at a time, so that base and steered text compare."""

from dataclasses import dataclass

import torch
from torch import nn

from activations_cache.models import Tokenizer
from activations_cache.reading import given_cache


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
) -> Generation:
    """Continue a prompt with the most likely token each time, until the end token.

    Inside `Steering` this gives the steered text. There is no sampling, no penalty and no chat
    template: what is seen is the model and the operations alone.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: The model's; it decides whether the prompt gets special tokens.
        prompt: The text.
        max_new_tokens: Tokens at most.
        use_cache: Keep keys and values of earlier positions; the text is the same without.

    Raises:
        ValueError: If the prompt has no tokens.
    """
    (found,) = generate_copies(
        model, tokenizer, prompt, 1, max_new_tokens=max_new_tokens, use_cache=use_cache
    )
    return found


def generate_copies(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    n_copies: int,
    *,
    max_new_tokens: int = 40,
    use_cache: bool = True,
) -> list[Generation]:
    """Continue several copies of a prompt side by side, in a context that steers each otherwise.

    A batch costs little more than one text, but in bfloat16 its sums round otherwise, so a text
    may differ from the one that `generate` gives. The arguments are those of `generate`.

    Raises:
        ValueError: If the prompt has no tokens.
    """
    prompt_tokens = tuple(tokenizer(prompt)["input_ids"])
    if not prompt_tokens:
        raise ValueError(f"prompt must have at least one token, got {prompt!r}")
    copies = [list(prompt_tokens) for _ in range(n_copies)]
    end = tokenizer.eos_token_id
    assert end is None or isinstance(end, int), end
    rows = _greedy(model, copies, end, max_new_tokens, use_cache)
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
