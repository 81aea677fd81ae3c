"""What steering does to a model: to what it was meant to change, and to everything else."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.steer.generation import Generation

Steered = Callable[[], AbstractContextManager[object]]
"""Makes the context in which the model is steered, such as `lambda: Steering(...)`."""

NGRAM = 3
"""Length of the token sequences whose repetition is counted."""

MAX_REPEATED = 0.15
"""A steered text with a larger share of repeated 3-grams counts as a loop."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Figures of one steered continuation beside the base continuation of the same prompt."""

    target_share_base: float
    """Share of the base continuation's tokens that are target tokens."""
    target_share: float
    """Share of the steered continuation's tokens that are target tokens."""
    target_gain: float
    """Mean over the base text's places of the rise of log p(target tokens), in nats."""
    repeated_base: float
    """Share of the base continuation's 3-grams that occur earlier in it."""
    repeated: float
    """The same of the steered continuation: near 1 in a loop."""
    nll_base: float
    """Nats per token of the base continuation under the model as it is."""
    nll: float
    """Nats per token of the steered continuation under the model as it is."""
    kl_neutral: float | None
    """KL(model as it is || steered) in nats per token on neutral text, where it was given."""


@torch.no_grad()
def measure_effect(
    model: nn.Module,
    steered: Steered,
    base: Generation,
    changed: Generation,
    targets: Int[Tensor, " k"],
    *,
    neutral: Int[Tensor, "example pos"] | None = None,
) -> Effect:
    """Measure a steered continuation.

    Args:
        model: A causal language model in evaluation mode.
        steered: Makes the context in which `changed` was generated.
        base: The continuation without steering.
        changed: The continuation of the same prompt with steering.
        targets: Tokens that the latent stands for: of its label's words, or promoted ones.
        neutral: Token ids of text that has nothing to do with the latent.
    """
    as_it_is = _log_probs(model, base.all_tokens)
    with steered():
        with_steering = _log_probs(model, base.all_tokens)
    first = len(base.prompt_tokens) - 1
    gain = _log_mass(with_steering, targets) - _log_mass(as_it_is, targets)
    return Effect(
        target_share_base=share_of(base.tokens, targets),
        target_share=share_of(changed.tokens, targets),
        target_gain=float(gain[first:].mean()),
        repeated_base=repeated_share(base.tokens),
        repeated=repeated_share(changed.tokens),
        nll_base=_nll(as_it_is, base),
        nll=_nll(_log_probs(model, changed.all_tokens), changed),
        kl_neutral=None if neutral is None else divergence(model, steered, neutral),
    )


@torch.no_grad()
def divergence(model: nn.Module, steered: Steered, neutral: Int[Tensor, "example pos"]) -> float:
    """Mean over tokens of KL(model as it is || steered), in nats, from float32 logits."""
    total = 0.0
    for tokens in neutral.tolist():
        log_p = _log_probs(model, tuple(tokens))
        with steered():
            log_q = _log_probs(model, tuple(tokens))
        total += float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean())
    return total / max(len(neutral), 1)


def repeated_share(tokens: tuple[int, ...], n: int = NGRAM) -> float:
    """Share of the n-grams that occur earlier in the sequence; 0 where there are none."""
    ngrams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def share_of(tokens: tuple[int, ...], targets: Int[Tensor, " k"]) -> float:
    """Share of the tokens that are among the targets; 0 where there are no tokens."""
    wanted = set(targets.tolist())
    return sum(token in wanted for token in tokens) / max(len(tokens), 1)


def _log_probs(model: nn.Module, tokens: tuple[int, ...]) -> Float[Tensor, "pos vocab"]:
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits
    return torch.log_softmax(logits[0].float(), dim=1)


def _log_mass(
    log_p: Float[Tensor, "pos vocab"], targets: Int[Tensor, " k"]
) -> Float[Tensor, " pos"]:
    return torch.logsumexp(log_p[:, targets.to(log_p.device)], dim=1)


def _nll(log_p: Float[Tensor, "pos vocab"], generation: Generation) -> float:
    if not generation.tokens:
        return 0.0
    tokens = torch.tensor(generation.tokens, device=log_p.device)
    predicted = log_p[len(generation.prompt_tokens) - 1 : -1]
    return -float(predicted.gather(1, tokens[:, None]).mean())
