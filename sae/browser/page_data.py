"""What the result page shows, as frozen dataclasses of plain Python values.

Every number is a Python int or float, every text a str; the page shows texts exactly and never
reads them as markup. A part that does not fit together is refused here, with ValueError, before
anything is written.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from activations_cache.checks import require
from sae.browser.site import Curve, Histogram, ResultTable, SteeringExample


def _require_finite(field: str, values: Iterable[float | int]) -> None:
    bad = next((value for value in values if not math.isfinite(value) or value < 0), None)
    require(bad is None, field, "be finite and at least 0", bad)


def _require_fraction(field: str, value: float | None) -> None:
    require(value is None or 0 <= value <= 1, field, "lie between 0 and 1", value)


def _require_unique(field: str, values: Iterable[object]) -> None:
    seen: set[object] = set()
    for value in values:
        require(value not in seen, field, "be unique", value)
        seen.add(value)


@dataclass(frozen=True)
class Context:
    """A piece of text in which a latent fires."""

    tokens: tuple[str, ...]
    """The tokens as text, each with its leading space if it has one."""
    activations: tuple[float, ...]
    """The latent's activation on each token, 0 where it is silent."""
    peak: int
    """Index of the token that the context was chosen for."""
    source: str
    """Where the text comes from, such as a file's or a document's name; may be empty."""

    def __post_init__(self) -> None:
        require(
            len(self.activations) == len(self.tokens),
            "activations",
            f"have one value per token ({len(self.tokens)})",
            len(self.activations),
        )
        _require_finite("activations", self.activations)
        inside = 0 <= self.peak < len(self.tokens)
        require(inside, "peak", f"be the index of one of the {len(self.tokens)} tokens", self.peak)


@dataclass(frozen=True)
class LatentPage:
    """Everything that is shown of one latent."""

    latent: int
    """Its number in the dictionary."""
    label: str
    """What it seems to stand for; may be empty."""
    kind: str
    """Which explainer made the label, such as "word", "token" or "supersense"."""
    auc: float | None
    """Score of the label on text that it was not made from; None where it was not scored."""
    auc_low: float | None
    """Lower end of the score's confidence interval."""
    auc_high: float | None
    """Upper end of the score's confidence interval."""
    status: Literal["scored", "insufficient"]
    """"insufficient" where there were too few examples to score the label."""
    density: float
    """Share of the rows on which it fires."""
    max_activation: float
    """Largest activation over the rows."""
    words: tuple[tuple[str, float], ...]
    """Associated words, strongest first, each with its weight."""
    promoted: tuple[str, ...]
    """Tokens that its decoder row makes more likely (logit lens), strongest first."""
    suppressed: tuple[str, ...]
    """Tokens that its decoder row makes less likely, strongest first."""
    contexts: tuple[Context, ...]
    """Texts in which it fires, strongest first."""
    histogram: tuple[int, ...]
    """Counts of its activations (zeros left out) in equal steps from 0 to max_activation."""

    def __post_init__(self) -> None:
        require(self.latent >= 0, "latent", "be at least 0", self.latent)
        known = self.status in {"scored", "insufficient"}
        require(known, "status", 'be "scored" or "insufficient"', self.status)
        needs_score = self.status == "scored" and self.auc is None
        require(not needs_score, "auc", 'be a number where status is "scored"', self.auc)
        for field in ("auc", "auc_low", "auc_high", "density"):
            _require_fraction(field, getattr(self, field))
        if self.auc_low is not None and self.auc_high is not None:
            ordered = self.auc_low <= self.auc_high
            require(ordered, "auc_low", f"be at most auc_high={self.auc_high}", self.auc_low)
        _require_finite("max_activation", (self.max_activation,))
        _require_finite("histogram", self.histogram)
        for word, weight in self.words:
            require(math.isfinite(weight), f"weight of word {word!r}", "be finite", weight)


@dataclass(frozen=True)
class DictionaryPage:
    """One dictionary and its latents."""

    name: str
    """Unique in the page; it stands in the links to latents."""
    summary: str
    """One sentence about it."""
    d_sae: int
    """Number of latents in the dictionary."""
    n_rows: int
    """Number of rows over which densities and maxima were taken."""
    n_live: int
    """Latents that fired on those rows."""
    n_dead: int
    """Latents that did not."""
    density_histogram: Histogram
    """Counts of latents by density."""
    latents: tuple[LatentPage, ...]
    """The latents to browse; any subset of the dictionary."""

    def __post_init__(self) -> None:
        require(bool(self.name), "name", "not be empty", self.name)
        whole = self.n_live + self.n_dead == self.d_sae
        require(
            whole and self.n_live >= 0 and self.n_dead >= 0,
            "n_live and n_dead",
            f"be at least 0 and add up to d_sae={self.d_sae}",
            (self.n_live, self.n_dead),
        )
        numbers = [page.latent for page in self.latents]
        _require_unique("latents' numbers", numbers)
        largest = max(numbers, default=-1)
        require(largest < self.d_sae, "latents' numbers", f"be below d_sae={self.d_sae}", largest)


@dataclass(frozen=True)
class PageData:
    """Everything on the result page."""

    title: str
    """The page's heading."""
    subtitle: str
    """One sentence under it; may be empty."""
    facts: tuple[tuple[str, str], ...]
    """Name and value, such as ("hook point", "model.layers.15:out")."""
    results: ResultTable
    """The results table."""
    curves: tuple[Curve, ...]
    """Training curves, one per dictionary."""
    dictionaries: tuple[DictionaryPage, ...]
    """The dictionaries to browse, their names all different."""
    steering: tuple[SteeringExample, ...]
    """Examples of steering."""
    cautions: tuple[str, ...]
    """What a reader must keep in mind, one sentence or two each."""

    def __post_init__(self) -> None:
        _require_unique("dictionaries' names", (page.name for page in self.dictionaries))
