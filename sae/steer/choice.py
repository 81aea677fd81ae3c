"""Chooses the latent of a steering example by trying many, and says how it was chosen.

Which labelled latents come into question for a steering example.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from activations_cache import hooks
from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.models import Tokenizer
from sae.autoencoder import SparseAutoencoder
from sae.read_out import LatentStats
from sae.steer.config import SteerConfig
from sae.steer.edits import Edit
from sae.steer.generation import (
    MAX_REPEATED,
    Effect,
    Generation,
    generate,
    generate_copies,
    measure_effect,
    repeated_share,
)
from sae.steer.steering import Steering, per_example

MIN_AUC = 0.7
"""A candidate's label must tell this well where the latent fires; 0.5 is chance."""

MIN_TARGETS = 3
"""A candidate must have so many target tokens."""

DENSITY = (1e-4, 0.02)
"""A candidate must fire in a share of the rows within these: neither noise nor everywhere."""


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
    """Ids of the tokens that steering should bring (see `target_tokens`)."""


class NothingToSteerError(MonosemaError):
    """No latent is fit to be steered as an example."""


def named(candidates: Sequence[Candidate], latent: int) -> list[Candidate]:
    """The candidate of this number.

    Raises:
        ValueError: If there is none.
    """
    results = [candidate for candidate in candidates if candidate.latent == latent]
    if not results:
        raise MonosemaError(f"latent must be one of the labelled ones, got {latent}")
    return results


def fit_candidates(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those with a good label of several words that fire neither seldom nor everywhere.

    Raises:
        NothingToSteerError: If there are none.
    """
    low, high = DENSITY
    is_fit = (
        c.auc >= MIN_AUC and low <= c.density <= high and len(c.targets) >= MIN_TARGETS
        for c in candidates
    )
    fit = [candidate for candidate, holds in zip(candidates, is_fit, strict=True) if holds]
    if not fit:
        raise NothingToSteerError(
            f"candidates must have one with AUC >= {MIN_AUC}, density in {low:g}..{high:g} and "
            f"{MIN_TARGETS} target tokens, got none among {len(candidates)}; name a latent"
        )
    return fit


def target_tokens(
    tokenizer: Tokenizer, words: Sequence[str], common: Collection[int] = ()
) -> tuple[int, ...]:
    """Ids of the tokens that are a word as a whole: inside a sentence, at its start, capitalised.

    Words of fewer than four letters, which are mostly grammar, what is no word, and words that the
    tokenizer splits give none; nor do words of which a form is among the `common` tokens, because
    any text holds these.
    """
    whole = [word for word in words if len(word) >= 4 and word.isalpha()]
    results = [_forms(tokenizer, word) for word in whole]
    rare = (ids for ids in results if not set(ids) & set(common))
    return tuple(dict.fromkeys(token for ids in rare for token in ids))


def _forms(tokenizer: Tokenizer, word: str) -> list[int]:
    """Ids of the forms of a word that are one token each."""
    forms = [space + form for form in (word, word.capitalize()) for space in (" ", "")]
    ids = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    return [given[0] for given in ids if len(given) == 1 and given[0] != tokenizer.unk_token_id]


N_ALIKE = 20
"""A latent's random counterpart is one of so many that fire most like it."""


def alike(
    stats: LatentStats, latents: Sequence[int], generator: torch.Generator
) -> tuple[int, ...]:
    """For each latent another one, drawn at random among those that fire as often and as strongly.

    That is, among the N_ALIKE nearest by |log density| + |log maximum|; none comes twice.

    Args:
        stats: How all latents fire.
        latents: Those that get a counterpart.
        generator: Draws them.

    Raises:
        ValueError: If too few latents fire.
    """
    live = stats.n_fired > 0
    live[[*latents]] = False
    if int(live.sum()) < len(latents):
        raise MonosemaError(
            f"as many other latents must fire as are steered, {len(latents)}, got "
            f"{int(live.sum())}; lower n_latents or set controls=0"
        )
    size = torch.stack([stats.n_fired.double(), stats.max_activation.double()]).clamp_min(1e-30)
    size, chosen = size.log(), []
    for latent in latents:
        far = (size - size[:, [latent]]).abs().sum(dim=0).masked_fill(~live, float("inf"))
        near = far.argsort(stable=True)[: min(N_ALIKE, int(live.sum()))]
        chosen.append(int(near[int(torch.randint(len(near), (), generator=generator))]))
        live[chosen[-1]] = False
    return tuple(chosen)


AT_ONCE = 32
"""Latents that are steered side by side, each on its own copy of the prompt."""

RULE = (
    f"among latents whose label has an AUC of {MIN_AUC} or more and {MIN_TARGETS} or more words "
    f"that are tokens, and which fire in {DENSITY[0]:.2%} to {DENSITY[1]:.0%} of the rows, those "
    "that raise the probability of these words after the prompt most are tried; shown is the one "
    f"whose text holds most of them, leaving out texts with more than {MAX_REPEATED:.0%} repeated "
    "3-grams"
)
"""How a latent is chosen, in one sentence for the reader of a report."""


class SteerSubject(NamedTuple):
    """What is steered, and with what."""

    model: nn.Module
    """A causal language model in evaluation mode."""
    tokenizer: Tokenizer
    """The model's."""
    dictionary: SparseAutoencoder
    """With its statistics, the unit of the strength."""
    first_position: int = 1
    """Positions below this one, the attention sinks, are left as they are."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One latent that was steered."""

    candidate: Candidate
    """The latent."""
    text: str
    """The steered continuation."""
    brought: tuple[int, ...]
    """Target tokens that are in this text and not in the base text."""
    repeated: float
    """Share of its 3-grams that occur earlier in it."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen latent, with all that it was chosen from."""

    chosen: Trial
    """The latent, steered once more on its own: what `Steering` and `generate` give again."""
    base: Generation
    """The continuation without steering."""
    effect: Effect
    """What steering did, in the chosen text."""
    trials: tuple[Trial, ...]
    """All latents that were tried, the best first, each in a batch with others."""
    n_candidates: int
    """Latents that met the conditions."""
    rule: str
    """How it was chosen, in one sentence."""


def choose_latent(
    subject: SteerSubject,
    candidates: Sequence[Candidate],
    config: SteerConfig,
    *,
    neutral: Int[Tensor, "example pos"] | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Steer the prompt by many latents and choose the one with the largest effect.

    Where the config names a latent, only that one is tried.

    Args:
        subject: The model and the dictionary.
        candidates: The labelled latents.
        config: Prompt, strength, mode, and how many are tried.
        neutral: Text on which the side effect of the chosen latent is measured.
        progress: Called after each batch of latents.

    Raises:
        ValueError: If there is nothing to try.
    """
    progress = progress or silent
    if config.latent is None:
        fit, rule = fit_candidates(candidates), RULE
    else:
        fit, rule = named(candidates, config.latent), "the latent was named in the config"
    tried = _most_promising(subject, fit, config, progress)
    base = _generate(subject, config)
    trials: list[Trial] = []
    for start in range(0, len(tried), AT_ONCE):
        trials += _try(subject, tried[start : start + AT_ONCE], base, config)
        progress(len(trials), len(tried), "latents tried")
    trials.sort(key=_rank)
    chosen = trials[0].candidate

    def steered():
        edits = [_edit(subject, chosen, config)]
        return Steering(subject.model, edits, first_position=subject.first_position)

    with steered():
        changed = _generate(subject, config)
    targets = torch.tensor(chosen.targets, dtype=torch.int64)
    return Choice(
        chosen=_trial(chosen, changed, base),
        base=base,
        effect=measure_effect(subject.model, steered, base, changed, targets, neutral=neutral),
        trials=tuple(trials),
        n_candidates=len(fit),
        rule=rule,
    )


@torch.no_grad()
def _most_promising(
    subject: SteerSubject, candidates: list[Candidate], config: SteerConfig, progress: Progress
) -> list[Candidate]:
    """Those after whose steering the prompt makes the target tokens most probable."""
    if len(candidates) <= config.n_candidates:
        return candidates
    prompt = subject.tokenizer(config.prompt)["input_ids"]
    device = next(subject.model.parameters()).device
    base = _next_probabilities(subject.model, torch.tensor([prompt], device=device))[0]
    rise: dict[int, float] = {}
    for start in range(0, len(candidates), AT_ONCE):
        part = candidates[start : start + AT_ONCE]
        with _steered_each(subject, part, config):
            copies = torch.tensor([prompt] * len(part), device=device)
            steered = _next_probabilities(subject.model, copies)
        for candidate, p in zip(part, steered, strict=True):
            targets = list(candidate.targets)
            rise[candidate.latent] = float(p[targets].sum() - base[targets].sum())
        progress(len(rise), len(candidates), "latents screened")
    ranked = sorted(candidates, key=lambda c: (-rise[c.latent], c.latent))
    return ranked[: config.n_candidates]


def _next_probabilities(
    model: nn.Module, input_ids: Int[Tensor, "example pos"]
) -> Float[Tensor, "example vocab"]:
    return model(input_ids=input_ids, use_cache=False).logits[:, -1].float().softmax(dim=1)


def _try(
    subject: SteerSubject, candidates: list[Candidate], base: Generation, config: SteerConfig
) -> list[Trial]:
    with _steered_each(subject, candidates, config):
        texts = generate_copies(
            subject.model,
            subject.tokenizer,
            config.prompt,
            len(candidates),
            max_new_tokens=config.max_new_tokens,
            chat=config.chat,
        )
    return [_trial(c, result, base) for c, result in zip(candidates, texts, strict=True)]


def _trial(candidate: Candidate, result: Generation, base: Generation) -> Trial:
    brought = set(candidate.targets) & set(result.tokens) - set(base.tokens)
    return Trial(
        candidate=candidate,
        text=result.text,
        brought=tuple(sorted(brought)),
        repeated=repeated_share(result.tokens),
    )


def _steered_each(subject: SteerSubject, candidates: list[Candidate], config: SteerConfig):
    """A context in which example i of a batch is steered by candidate i."""
    edits = [_edit(subject, candidate, config) for candidate in candidates]
    fn = per_example(edits, first_position=subject.first_position)
    return hooks.edit(subject.model, {subject.dictionary.hook_point: fn})


def _edit(subject: SteerSubject, candidate: Candidate, config: SteerConfig) -> Edit:
    strength = f"{float(config.strength)!r}x max"
    if config.mode == "clamp":
        return Edit(subject.dictionary, latent=candidate.latent, clamp=strength)
    return Edit(subject.dictionary, latent=candidate.latent, add=strength)


def _generate(subject: SteerSubject, config: SteerConfig) -> Generation:
    options = {"max_new_tokens": config.max_new_tokens, "chat": config.chat}
    return generate(subject.model, subject.tokenizer, config.prompt, **options)


def _rank(trial: Trial) -> tuple[bool, int, float, float, int]:
    candidate = trial.candidate
    is_loop = trial.repeated > MAX_REPEATED
    return is_loop, -len(trial.brought), -candidate.auc, trial.repeated, candidate.latent
