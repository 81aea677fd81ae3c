"""Which labelled latents come into question for a steering example."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from activations_cache.models import Tokenizer

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


def named(candidates: Sequence[Candidate], latent: int) -> list[Candidate]:
    """The candidate of this number.

    Raises:
        ValueError: If there is none.
    """
    found = [candidate for candidate in candidates if candidate.latent == latent]
    if not found:
        raise ValueError(f"latent must be one of the labelled ones, got {latent}")
    return found


def fit_candidates(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those with a good label of several words that fire neither seldom nor everywhere.

    Raises:
        ValueError: If there are none.
    """
    low, high = DENSITY
    is_fit = (
        c.auc >= MIN_AUC and low <= c.density <= high and len(c.targets) >= MIN_TARGETS
        for c in candidates
    )
    fit = [candidate for candidate, holds in zip(candidates, is_fit, strict=True) if holds]
    if not fit:
        raise ValueError(
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
    found = [_forms(tokenizer, word) for word in whole]
    rare = (ids for ids in found if not set(ids) & set(common))
    return tuple(dict.fromkeys(token for ids in rare for token in ids))


def _forms(tokenizer: Tokenizer, word: str) -> list[int]:
    """Ids of the forms of a word that are one token each."""
    forms = [space + form for form in (word, word.capitalize()) for space in (" ", "")]
    ids = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    return [given[0] for given in ids if len(given) == 1 and given[0] != tokenizer.unk_token_id]
