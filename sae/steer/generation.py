"""Greedy continuation of a prompt, one token at a time, so that base and steered text compare."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from activations_cache.models import Tokenizer


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


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 40,
    use_cache: bool = True,
) -> Generation:
    """Continue a prompt with the most likely token each time, until the end token.

    Inside `steering` this gives the steered text. There is no sampling, no penalty and no chat
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
    prompt_tokens = tuple(tokenizer(prompt)["input_ids"])
    if not prompt_tokens:
        raise ValueError(f"prompt must have at least one token, got {prompt!r}")
    device = next(model.parameters()).device
    tokens: list[int] = []
    fresh, past = list(prompt_tokens), None
    while len(tokens) < max_new_tokens:
        arguments: dict[str, Any] = {"past_key_values": past} if use_cache else {}
        input_ids = torch.tensor([fresh], device=device)
        output = model(input_ids=input_ids, use_cache=use_cache, **arguments)
        chosen = int(output.logits[0, -1].argmax())
        if chosen == tokenizer.eos_token_id:
            break
        tokens.append(chosen)
        past = output.past_key_values
        fresh = [chosen] if use_cache else [*prompt_tokens, *tokens]
    return Generation(
        prompt=prompt,
        text=str(tokenizer.decode(tokens)),
        prompt_tokens=prompt_tokens,
        tokens=tuple(tokens),
        max_new_tokens=max_new_tokens,
    )
