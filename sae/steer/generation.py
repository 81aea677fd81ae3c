"""Greedy continuation of a prompt, and what steering does to it.

One token is written at a time, so that base and steered text compare. Effects are measured on what
steering was meant to change, and on everything else.

Which tokens are changed: policies that give the same answer with and without a KV cache.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from activations_cache.models import Tokenizer
from activations_cache.probe import record_of, require_next_token
from activations_cache.prompts import Prompt
from activations_cache.reading import given_cache
from monosema.checks import MonosemaError
from sae import notebook


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

    def _repr_html_(self) -> str:
        return notebook.texts(self.prompt, [("", self.text)])


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
    (result,) = generate_copies(model, tokenizer, prompt, 1, **options)
    return result


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
    """Mean over tokens of KL(model as it is || steered), in nats, from float32 logits.

    Token -1 is the end of a text that is shorter than others.
    """
    total = 0.0
    for tokens in neutral.tolist():
        text = tuple(token for token in tokens if token >= 0)
        log_p = _log_probs(model, text)
        with steered():
            log_q = _log_probs(model, text)
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


POLICIES = ("all", "prompt", "generated", "last", "class")
"""`last` is the prompt's last token; `class` is position 0, the class token of a ViT."""


@dataclass(frozen=True, kw_only=True)
class Patches:
    """The patches of a ViT, without class token and registers."""

    n_prefix: int
    """Positions before the first patch: `Reading.n_prefix` of a loaded vision model."""


Positions = str | Patches | Bool[Tensor, "_example _pos"]
"""One of POLICIES, the patches of a ViT, or a mask, which has a column for each token of the
prompts, padding included; nothing after the prompts is chosen by it."""


def check_positions(positions: Positions) -> None:
    """Check a policy before a model runs.

    Raises:
        ValueError: If it is not known.
    """
    if isinstance(positions, str) and positions not in POLICIES:
        raise MonosemaError(
            f"positions must be one of {', '.join(POLICIES)}, a mask or Patches, got {positions!r}"
        )


def chosen(
    policy: Positions,
    positions: Int[Tensor, "example pos"],
    prompt: Prompt | None,
    first_position: int,
) -> Bool[Tensor, "example pos"]:
    """Where a policy holds in one forward.

    Args:
        policy: The policy.
        positions: Absolute positions of the tokens, negative for padding.
        prompt: The prompts of these examples; None where the model reads no tokens.
        first_position: Positions below this one, the attention sinks, are never chosen, but by
            `class`.

    Raises:
        ValueError: If the policy needs a prompt and there is none, or a mask has another shape.
    """
    if isinstance(policy, Patches):
        return positions >= policy.n_prefix
    if isinstance(policy, str) and policy == "class":
        return positions == 0
    if prompt is None:
        if not isinstance(policy, str) or policy != "all":
            raise MonosemaError(
                f"positions must be all, class or Patches without a prompt, got {policy}"
            )
        return positions >= first_position
    n_tokens = prompt.n_tokens[:, None].to(positions.device)
    inside = positions < n_tokens
    return (positions >= first_position) & _of_prompt(policy, positions, prompt, inside)


def _of_prompt(
    policy: Positions,
    positions: Int[Tensor, "example pos"],
    prompt: Prompt,
    inside: Bool[Tensor, "example pos"],
) -> Bool[Tensor, "example pos"]:
    if isinstance(policy, Tensor):
        return inside & _masked(policy, positions, prompt)
    match policy:
        case "all":  # what follows a whole prompt is padding
            return inside if prompt.is_whole else torch.ones_like(inside)
        case "prompt":
            return inside
        case "generated":
            return torch.zeros_like(inside) if prompt.is_whole else ~inside
        case _:
            return positions == prompt.n_tokens[:, None].to(positions.device) - 1


def _masked(
    mask: Bool[Tensor, "_example _pos"], positions: Int[Tensor, "example pos"], prompt: Prompt
) -> Bool[Tensor, "example pos"]:
    n_examples, n_columns = mask.shape
    if len(positions) % n_examples:
        raise MonosemaError(
            f"a mask of positions must have a row for each of {len(positions)} examples, "
            f"got {n_examples}"
        )
    rows = mask.to(positions.device).repeat_interleave(len(positions) // n_examples, dim=0)
    columns = positions + prompt.n_padding[:, None].to(positions.device)
    within = (columns >= 0) & (columns < n_columns)
    return rows.gather(1, columns.clamp(0, n_columns - 1)) & within
