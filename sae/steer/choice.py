"""Chooses the latent of a steering example by trying several, and says how it was chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from activations_cache.models import Tokenizer
from activations_cache.progress import Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.metrics import Firing
from sae.steer.config import SteerConfig
from sae.steer.effects import Effect, measure_effect
from sae.steer.generation import Generation, generate
from sae.steer.steering import steering

MIN_AUC = 0.8
"""A candidate's label must tell this well where the latent fires."""

DENSITY = (1e-4, 0.02)
"""A candidate must fire in a share of the rows within these: neither noise nor everywhere."""

MAX_REPEATED = 0.25
"""A steered text with a larger share of repeated 3-grams counts as a loop."""

RULE = (
    f"of the latents with a label of AUC >= {MIN_AUC} and a density in "
    f"{DENSITY[0]:g}..{DENSITY[1]:g}, the best by AUC with different labels were steered; shown is "
    "the one whose steered text has the most target tokens more than the base text, texts with "
    f"more than {MAX_REPEATED:.0%} repeated 3-grams last"
)
"""How a latent is chosen, in one sentence for the reader of a report."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is known of a latent before it is steered."""

    latent: int
    """Its number."""
    label: str
    """Its label."""
    auc: float
    """How well the label tells where the latent fires, on text that did not make the label."""
    density: float
    """Share of the rows in which it fires."""
    targets: tuple[int, ...]
    """Token ids that steering should bring: of the label's words, or promoted ones."""


class Subject(NamedTuple):
    """What is steered, and with what."""

    model: nn.Module
    """A causal language model in evaluation mode."""
    tokenizer: Tokenizer
    """The model's."""
    hook_point: str
    """Where the dictionary reads and writes."""
    dictionary: SparseAutoencoder
    """On the model's device."""
    stats: Firing
    """The dictionary's; the unit of the strength."""
    first_position: int = 1
    """Positions below this one, the attention sinks, are left as they are."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One latent that was steered."""

    candidate: Candidate
    """The latent."""
    text: str
    """The steered continuation."""
    effect: Effect
    """What steering did."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen trial, with all that it was chosen from."""

    chosen: Trial
    """What is shown."""
    base: Generation
    """The continuation without steering."""
    trials: tuple[Trial, ...]
    """All latents that were tried, the chosen one among them, the best first."""
    n_candidates: int
    """Latents that there were to choose from."""
    rule: str
    """How it was chosen, in one sentence."""


def choose_latent(
    subject: Subject,
    candidates: Sequence[Candidate],
    config: SteerConfig,
    *,
    neutral: Int[Tensor, "example pos"] | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Steer the prompt by several latents and choose the one with the largest effect.

    Where the config names a latent, only that one is tried.

    Args:
        subject: The model and the dictionary.
        candidates: The labelled latents; those without targets are passed over.
        config: Prompt, strength, mode, and how many are tried.
        neutral: Text on which the side effect of each is measured.
        progress: Called after each latent.

    Raises:
        ValueError: If there is nothing to try.
    """
    progress = progress or silent
    tried = shortlist(candidates, config)
    rule = RULE if config.latent is None else "the latent was named in the config"
    prompt, n_tokens = config.prompt, config.max_new_tokens
    base = generate(subject.model, subject.tokenizer, prompt, max_new_tokens=n_tokens)
    trials: list[Trial] = []
    for candidate in tried:
        trials.append(_trial(subject, candidate, base, config, neutral))
        progress(len(trials), len(tried), "latents steered")
    ranked = tuple(sorted(trials, key=_rank, reverse=True))
    return Choice(
        chosen=ranked[0], base=base, trials=ranked, n_candidates=len(candidates), rule=rule
    )


def target_tokens(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[int, ...]:
    """Ids of the tokens that are a word as a whole: inside a sentence, at its start, capitalised.

    A word that the tokenizer always splits gives none.
    """
    cased = [form for word in words for form in (word, word.capitalize())]
    forms = [space + form for form in cased for space in (" ", "")]
    ids = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    whole = (found[0] for found in ids if len(found) == 1 and found[0] != tokenizer.unk_token_id)
    return tuple(dict.fromkeys(whole))


def shortlist(candidates: Sequence[Candidate], config: SteerConfig) -> list[Candidate]:
    """The candidates that are tried, the best label first; no two with the same label.

    Raises:
        ValueError: If none is left.
    """
    if config.latent is not None:
        named = [c for c in candidates if c.latent == config.latent]
        if not named:
            raise ValueError(f"latent must be one of the labelled ones, got {config.latent}")
        return named
    low, high = DENSITY
    fit = [c for c in candidates if c.targets and c.auc >= MIN_AUC and low <= c.density <= high]
    best: dict[str, Candidate] = {}
    for candidate in sorted(fit, key=lambda c: (-c.auc, c.latent)):
        best.setdefault(candidate.label, candidate)
    if not best:
        raise ValueError(
            f"candidates must have one with AUC >= {MIN_AUC} and density in {low:g}..{high:g}, "
            f"got none among {len(candidates)}; name a latent"
        )
    return list(best.values())[: config.n_candidates]


def _trial(
    subject: Subject,
    candidate: Candidate,
    base: Generation,
    config: SteerConfig,
    neutral: Int[Tensor, "example pos"] | None,
) -> Trial:
    model, tokenizer, hook_point, dictionary, stats, first = subject
    operations = [config.operation(candidate.latent)]

    def steered():
        return steering(
            model, hook_point, dictionary, operations, stats=stats, first_position=first
        )

    with steered():
        changed = generate(model, tokenizer, config.prompt, max_new_tokens=config.max_new_tokens)
    targets = torch.tensor(candidate.targets, dtype=torch.int64)
    effect = measure_effect(model, steered, base, changed, targets, neutral=neutral)
    return Trial(candidate=candidate, text=changed.text, effect=effect)


def _rank(trial: Trial) -> tuple[bool, float, float]:
    effect = trial.effect
    more = effect.target_share - effect.target_share_base
    return effect.repeated <= MAX_REPEATED, more, effect.target_gain
