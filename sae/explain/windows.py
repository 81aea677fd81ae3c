"""Windows: short pieces of an example with one latent's activation on each token.

Rules that say of each piece of a text how strongly a latent should fire.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, get_args, runtime_checkable

from sae.explain.text_at_rows import word_begins

Source = Literal["active", "random", "lexical", "similar", "weak"]
"""Why a window was taken; all but "active" are negatives, each verified."""

NEGATIVES: tuple[Source, ...] = get_args(Source)[1:]
"""The four sources of negatives."""

T = TypeVar("T")


@dataclass(frozen=True)
class Window:
    """A piece of an example as one latent sees it."""

    example: int
    """Number of the example in the cache."""
    start: int
    """Position of the first token, or patch."""
    tokens: tuple[str, ...]
    """The tokens as text; empty strings for the patches of an image."""
    activations: tuple[float, ...]
    """The latent's activation on each token."""
    source: Source
    """Why it was taken."""
    step: int = -1
    """Step of the peak, equal ones from 0 to the latent's largest activation; -1 for negatives."""
    inclusion: float = 1.0
    """Probability with which a window of this stratum was taken."""

    @property
    def text(self) -> str:
        """The tokens joined."""
        return "".join(self.tokens)

    @property
    def peak(self) -> float:
        """Largest activation."""
        return max(self.activations, default=0.0)

    def marks(self, share: float = 0.3) -> tuple[bool, ...]:
        """Which tokens have at least this share of the window's peak."""
        least = share * self.peak
        return tuple(value > 0 and value >= least for value in self.activations)


@dataclass(frozen=True)
class LatentWindows:
    """What explainers and scorers see of one latent; the two sets come from other documents."""

    latent: int
    """Its number."""
    max_activation: float
    """Largest activation in the corpus."""
    density: float
    """Share of the rows on which it fires."""
    explain: tuple[Window, ...]
    """What explanations are written from."""
    score: tuple[Window, ...]
    """What they are scored on."""
    promoted: tuple[str, ...] = ()
    """Tokens that its direction makes likelier, by the logit lens."""
    suppressed: tuple[str, ...] = ()
    """Tokens that it makes less likely."""

    def of(self, split: Literal["explain", "score"], *sources: Source) -> list[Window]:
        """The windows of a split from these sources, in their order."""
        windows = self.explain if split == "explain" else self.score
        return [window for window in windows if window.source in sources]


def seed_of(*purpose: object) -> int:
    """A seed that depends on what it is for, and on nothing that runs before it."""
    return int.from_bytes(hashlib.sha256(repr(purpose).encode()).digest()[:8], "big")


def shuffled(items: Sequence[T], *purpose: object) -> list[T]:
    """The items in an order that depends on the purpose alone."""
    order = sorted(range(len(items)), key=lambda index: seed_of(*purpose, index))
    return [items[index] for index in order]


@runtime_checkable
class Rule(Protocol):
    """An executable explanation: how strongly it expects a latent to fire on each piece of text."""

    def __call__(self, pieces: Sequence[str]) -> list[float]:
        """Strengths from 0 to 1."""
        ...


@dataclass(frozen=True)
class WordRule:
    """Fires on listed words, or on what follows them; pieces of one word share its strength."""

    weights: Mapping[str, float]
    """Strength of each word, in lower case; the largest counts as 1."""
    previous: bool = False
    """Whether the word before is looked up instead."""
    pair: bool = False
    """Whether it is the word before and the word, with a blank between."""

    def __call__(self, pieces: Sequence[str]) -> list[float]:
        """Strengths from 0 to 1."""
        top = max(self.weights.values(), default=0.0) or 1.0
        words, of_piece = _words(pieces)
        keys = words
        if self.pair:
            keys = [f"{a} {b}" for a, b in zip(["", *words], words, strict=False)]
        strength = [self.weights.get(key, 0.0) / top for key in keys]
        if self.previous:
            strength = [0.0, *strength[:-1]]
        return [strength[index] for index in of_piece]


def _words(pieces: Sequence[str]) -> tuple[list[str], list[int]]:
    """The words that pieces make, as `text_at_rows.join_words` does, and the word of each."""
    words: list[str] = []
    of_piece: list[int] = []
    for piece, begins in zip(pieces, word_begins(pieces), strict=True):
        shown = piece.strip().lower() or piece
        if begins:
            words.append(shown)
        else:
            words[-1] += shown
        of_piece.append(len(words) - 1)
    return words, of_piece


def caption_windows(latent: LatentWindows, captions: Sequence[str]) -> LatentWindows:
    """The latent with each image replaced by its caption or report, and all of it marked.

    This is the idea of SAE-Rad (Abdulaal et al. 2024, arXiv 2410.03334): explainers and the
    detection scorer then work on images as they do on text. The activation of a caption is the
    image's peak.

    Args:
        latent: Windows that are whole images.
        captions: One text per example of the cache.
    """

    def captioned(window: Window) -> Window:
        return Window(
            window.example, 0, (captions[window.example],), (window.peak,), window.source,
            window.step, window.inclusion,
        )  # fmt: skip

    explain, score = (tuple(map(captioned, part)) for part in (latent.explain, latent.score))
    return LatentWindows(latent.latent, latent.max_activation, latent.density, explain, score)
