"""What the browser shows of one latent, as frozen dataclasses of plain Python values.

Every number is a Python int or float, every text a str; texts are shown exactly and never read as
markup. A part that does not fit together is refused with ValueError before anything is written.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from activations_cache.checks import require


def require_finite(field: str, values: Sequence[float | int]) -> None:
    """Refuse a value that is not finite or below 0."""
    if values and min(values) >= 0 and math.isfinite(sum(values)):
        return
    bad = next((value for value in values if not math.isfinite(value) or value < 0), None)
    require(bad is None, field, "be finite and at least 0", bad)


def require_numbers(field: str, values: Sequence[float | int]) -> None:
    """Refuse a value that is not finite."""
    bad = next((value for value in values if not math.isfinite(value)), None)
    require(bad is None, field, "be finite", bad)


def require_fraction(field: str, value: float | None) -> None:
    """Refuse what is no share."""
    require(value is None or 0 <= value <= 1, field, "lie between 0 and 1", value)


def require_unique(field: str, values: Iterable[object]) -> None:
    """Refuse what comes twice."""
    seen: set[object] = set()
    for value in values:
        require(value not in seen, field, "be unique", value)
        seen.add(value)


def require_length(field: str, values: Sequence[object], n: int, per: str) -> None:
    """Refuse a sequence that does not fit to another."""
    require(len(values) == n, field, f"have one value per {per} ({n})", len(values))


Status = Literal["dead", "insufficient", "scored", "live"]
"""Dead; live but too rare to be scored; scored; live and nobody scored it."""

STATUSES: tuple[Status, ...] = get_args(Status)
N_FIFTHS = 5
"""Equal steps from 0 to a latent's largest activation, into which its examples are sorted."""

Pair = tuple[int, float]
"""A latent and what it has to do with another one."""


@dataclass(frozen=True)
class Image:
    """The picture that an example is; the file is `data/images/{number}.jpg`."""

    number: int
    """Its number in `Site.pictures`."""
    name: str
    """What it is called, such as a file name; may be empty."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    width: int
    """Pixels of the picture as it is stored."""
    height: int
    """The same."""

    def __post_init__(self) -> None:
        sizes = (*self.grid, self.width, self.height)
        require(min(sizes) > 0, "grid, width and height", "be above 0", sizes)
        require(self.number >= 0, "number", "be at least 0", self.number)


@dataclass(frozen=True)
class Example:
    """A piece of text, or a picture, in which a latent fires."""

    tokens: tuple[str, ...]
    """The tokens as text, each with its leading space if it has one; none for a picture."""
    activations: tuple[float, ...]
    """The latent's activation on each token or patch (row by row), 0 where it is silent."""
    peak: int
    """Index of the token or patch that the example was chosen for."""
    source: str
    """Where it comes from, such as a document's name; may be empty."""
    image: Image | None = None
    """The picture."""

    def __post_init__(self) -> None:
        n, per = len(self.tokens), "token"
        if self.image is not None:
            require(not self.tokens, "tokens", "be empty for a picture", self.tokens)
            n, per = self.image.grid[0] * self.image.grid[1], "patch"
        require_length("activations", self.activations, n, per)
        require_finite("activations", self.activations)
        inside = 0 <= self.peak < n
        require(inside, "peak", f"be the index of one of the {n} {per}s", self.peak)


@dataclass(frozen=True)
class ShownScore:
    """How good a label is by one measure."""

    name: str
    """The measure; a control has the name of what it controls."""
    value: float | None
    """None where there is none; then `note` says why."""
    low: float | None = None
    """Lower end of its 95 % interval."""
    high: float | None = None
    """Upper end."""
    floor: float | None = None
    """What knowing nothing gives."""
    n: int | None = None
    """Items that it rests on."""
    control: str = ""
    """What was put in the label's place, such as "another latent's label"; empty: the label."""
    note: str = ""
    """Whatever else must be said."""

    def __post_init__(self) -> None:
        known = [v for v in (self.value, self.low, self.high, self.floor) if v is not None]
        require_numbers(f"score {self.name!r}", known)
        if self.low is not None and self.high is not None:
            require(self.low <= self.high, "low", f"be at most high={self.high}", self.low)


@dataclass(frozen=True)
class ShownExplanation:
    """A further explanation of a latent."""

    text: str
    """What it says."""
    by: str
    """What made it, such as a language model's name."""


@dataclass(frozen=True)
class ShownAttribution:
    """How much each token's firing of the latent did for an output of the model."""

    tokens: tuple[str, ...]
    """The prompt."""
    values: tuple[float, ...]
    """Attribution of each token, signed."""
    target: str
    """What was attributed, such as the token that the model was to predict."""
    effect: float | None = None
    """Change of the target when the latent was really turned off."""
    note: str = ""
    """How it was measured."""

    def __post_init__(self) -> None:
        require_length("values", self.values, len(self.tokens), "token")
        require_numbers("values", self.values)


@dataclass(frozen=True)
class Latent:
    """Everything that is shown of one latent; parts that a run does not have stay empty."""

    number: int
    """Its number in the dictionary."""
    status: Status
    """Whether it lives, and whether its label was scored."""
    density: float
    """Share of the rows on which it fires."""
    max_activation: float
    """Largest activation over the rows."""
    n_fired: int | None = None
    """Rows on which it fires."""
    label: str = ""
    """What it seems to stand for."""
    label_kind: str = ""
    """Which explainer made the label, such as "word" or "supersense"."""
    figures: Mapping[str, float | None] = field(default_factory=dict)
    """Figures for the table by the id of their column."""
    explanations: tuple[ShownExplanation, ...] = ()
    """Further explanations."""
    scores: tuple[ShownScore, ...] = ()
    """Scores of the label, and their controls."""
    histogram: tuple[int, ...] = ()
    """Counts of its activations (zeros left out) in equal steps from 0 to max_activation."""
    words: tuple[tuple[str, float], ...] = ()
    """Associated words, strongest first, each with its weight."""
    promoted: tuple[tuple[str, float | None], ...] = ()
    """Tokens that its direction makes likelier (logit lens), each with its logit if known."""
    suppressed: tuple[tuple[str, float | None], ...] = ()
    """Tokens that it makes less likely."""
    examples: tuple[Example, ...] = ()
    """Where it fires, strongest first."""
    nearest: tuple[Pair, ...] = ()
    """Latents with the most similar directions, each with its cosine."""
    cofiring: tuple[tuple[int, float, int], ...] = ()
    """Latents that fire on the same rows: number, Jaccard index, rows on which both fire."""
    attributions: tuple[ShownAttribution, ...] = ()
    """Attribution examples."""
    command: str = ""
    """The command that steers the model by it."""

    def __post_init__(self) -> None:
        require(self.number >= 0, "number", "be at least 0", self.number)
        require_fraction("density", self.density)
        require_finite("max_activation", (self.max_activation,))
        require_finite("histogram", self.histogram)
        require_numbers("weights of words", [weight for _, weight in self.words])
        require_numbers("cosines of nearest", [cosine for _, cosine in self.nearest])

    def fifth(self, example: Example) -> int:
        """The step from 0 to the largest activation in which the example's peak lies."""
        peak = example.activations[example.peak]
        largest = max(self.max_activation, peak)
        return min(N_FIFTHS - 1, int(N_FIFTHS * peak / largest)) if largest > 0 else 0
