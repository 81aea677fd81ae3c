"""What the browser shows of a run beside its latents, as frozen dataclasses of plain values.

A part that a run does not have stays empty or None; nothing is made up for it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from activations_cache.checks import require
from sae import notebook
from sae.browser.latent import (
    Latent,
    require_finite,
    require_length,
    require_numbers,
    require_unique,
)

DENSE_ABOVE = 0.1
"""A latent that fires on more than this share of the rows is called dense."""


@dataclass(frozen=True)
class ResultTable:
    """The one table of the run; the first column names the row."""

    columns: tuple[str, ...]
    """Headings; the first one heads the names."""
    rows: tuple[tuple[str, ...], ...]
    """Cells as they are to be read, one row per dictionary or baseline."""
    note: str
    """What the figures were measured on, shown under the table; may be empty."""

    def __post_init__(self) -> None:
        n = len(self.columns)
        for row in self.rows:
            require(len(row) == n, "rows", f"have one cell per column ({n})", row)

    def _repr_html_(self) -> str:
        return notebook.table("", self.columns, self.rows, self.note)


@dataclass(frozen=True)
class Curve:
    """The metrics of one dictionary while it was trained."""

    name: str
    """The dictionary's name."""
    steps: tuple[int, ...]
    """Rows seen at each point, ascending."""
    values: Mapping[str, tuple[float, ...]]
    """For each metric, such as "FVU", one value per point; a value that is not finite is a gap."""

    def __post_init__(self) -> None:
        ascending = all(a <= b for a, b in zip(self.steps, self.steps[1:], strict=False))
        require(ascending, "steps", "ascend", self.steps)
        for metric, values in self.values.items():
            require_length(f"values[{metric!r}]", values, len(self.steps), "step")


@dataclass(frozen=True)
class Histogram:
    """Counts between edges."""

    edges: tuple[float, ...]
    """One more than counts, strictly ascending; base-10 logarithms if log10."""
    counts: tuple[int, ...]
    """How many fell between edges[i] and edges[i + 1]."""
    log10: bool
    """Whether the edges are base-10 logarithms of the quantity."""

    def __post_init__(self) -> None:
        n = len(self.counts)
        fits = len(self.edges) == n + 1
        require(fits, "edges", f"be one more than counts ({n})", len(self.edges))
        require_numbers("edges", self.edges)
        ascending = all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False))
        require(ascending, "edges", "ascend strictly", self.edges)
        require_finite("counts", self.counts)


@dataclass(frozen=True)
class Column:
    """A figure of the table of latents."""

    id: str
    """Its key in `Latent.figures`."""
    name: str
    """Its heading."""
    kind: Literal["share", "number", "score", "count"]
    """How it is to be read."""
    floor: float | None = None
    """What knowing nothing gives, for a score."""
    note: str = ""
    """What it is, in a sentence."""


@dataclass(frozen=True)
class PlaneMap:
    """The latents of a dictionary as points of a plane."""

    name: str
    """How the points were computed, such as "PCA"."""
    x: tuple[float, ...]
    """One per latent; nan where it is not drawn."""
    y: tuple[float, ...]
    """The same."""
    note: str = ""
    """What the picture does not say."""

    def __post_init__(self) -> None:
        require_length("y", self.y, len(self.x), "x")


@dataclass(frozen=True)
class Map:
    """Layouts of the latents, the one that is shown first at the front, and their clusters."""

    layouts: tuple[PlaneMap, ...]
    """At least one."""
    clusters: tuple[str, ...] = ()
    """Names of clusters."""
    cluster: tuple[int, ...] = ()
    """Index of each latent's cluster, -1 for none; empty without clusters."""

    def __post_init__(self) -> None:
        require(bool(self.layouts), "layouts", "hold at least one layout", self.layouts)
        n = len(self.layouts[0].x)
        for layout in self.layouts:
            require_length(f"layout {layout.name!r}", layout.x, n, "point of the first layout")
        if self.clusters:
            require_length("cluster", self.cluster, n, "point")


@dataclass(frozen=True)
class Completeness:
    """Which concepts have a latent, by their frequency."""

    points: tuple[tuple[float, float, int], ...]
    """Frequency, share of the concepts about as frequent that have a latent, and their number."""
    f50: float
    """Frequency at which half of the concepts have one."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    """Upper end."""
    slope: float
    """Steepness of the logistic curve per nat of frequency."""
    times_alive: float
    """f50 times the number of live latents."""
    n: int
    """Concepts."""
    note: str = ""
    """What counts as a concept, and as having a latent."""

    def __post_init__(self) -> None:
        require_finite("points", [number for point in self.points for number in point])
        require_numbers(
            "the fitted curve", (self.f50, self.low, self.high, self.slope, self.times_alive)
        )


@dataclass(frozen=True)
class Dictionary:
    """One dictionary and its latents."""

    name: str
    """What it is called; unique in the site."""
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
    latents: Iterable[Latent]
    """The latents to browse, their numbers ascending; any subset. Read once, a file at a time."""
    n_dense: int | None = None
    """Latents whose density is above DENSE_ABOVE."""
    kind: Literal["text", "image"] = "text"
    """What its examples are."""
    facts: tuple[tuple[str, str], ...] = ()
    """Name and value."""
    columns: tuple[Column, ...] = ()
    """Figures of the table, besides density and largest activation."""
    density_histogram: Histogram | None = None
    """Counts of latents by density."""
    map: Map | None = None
    """Its latents in a plane."""
    completeness: Completeness | None = None
    """Which concepts it has."""

    def __post_init__(self) -> None:
        require(bool(self.name), "name", "not be empty", self.name)
        whole = self.n_live + self.n_dead == self.d_sae
        require(
            whole and self.n_live >= 0 and self.n_dead >= 0,
            "n_live and n_dead",
            f"be at least 0 and add up to d_sae={self.d_sae}",
            (self.n_live, self.n_dead),
        )
        require_unique("columns' ids", (column.id for column in self.columns))
        if self.map is not None:
            require_length("map", self.map.layouts[0].x, self.d_sae, "latent")


@dataclass(frozen=True)
class ShownComparison:
    """Two dictionaries of the same stream side by side, by the cosine of their directions."""

    a: str
    """Name of a dictionary."""
    b: str
    """Name of another one."""
    in_b: tuple[tuple[int, float], ...]
    """For each latent of a its nearest latent of b and the cosine."""
    in_a: tuple[tuple[int, float], ...]
    """For each latent of b its nearest latent of a and the cosine."""
    least: float
    """A cosine below it is no counterpart."""
    chance: float | None = None
    """Of random directions' nearest latents 95 % lie below."""
    note: str = ""
    """What must be kept in mind."""


@dataclass(frozen=True)
class SteeringExample:
    """What the model writes with and without one latent changed."""

    dictionary: str
    """Name of the dictionary."""
    latent: int
    """Number of the latent."""
    label: str
    """The latent's label."""
    strength: float
    """How far it was turned, in `unit`."""
    prompt: str
    """The text given to the model."""
    base: str
    """The model's continuation, without the prompt."""
    steered: str
    """The continuation of the steered model, without the prompt."""
    unit: str = "times its maximum"
    """What `strength` counts."""

    def __post_init__(self) -> None:
        require(math.isfinite(self.strength), "strength", "be finite", self.strength)


@dataclass(frozen=True)
class Site:
    """Everything that the browser shows."""

    title: str
    """Its heading."""
    subtitle: str
    """One sentence under it; may be empty."""
    facts: tuple[tuple[str, str], ...]
    """Name and value, such as ("hook point", "model.layers.15:out")."""
    dictionaries: tuple[Dictionary, ...]
    """The dictionaries to browse, their names all different."""
    results: ResultTable | None = None
    """The results table, baselines among its rows."""
    curves: tuple[Curve, ...] = ()
    """Training curves."""
    steering: tuple[SteeringExample, ...] = ()
    """Examples of steering."""
    comparisons: tuple[ShownComparison, ...] = ()
    """Dictionaries side by side."""
    cautions: tuple[str, ...] = ()
    """What a reader must keep in mind, one sentence or two each."""
    pictures: Iterable[tuple[int, bytes]] = ()
    """Numbers and JPEG bytes of the pictures that examples name. Read once."""

    def __post_init__(self) -> None:
        by_name = {dictionary.name: dictionary for dictionary in self.dictionaries}
        require_unique("dictionaries' names", (d.name for d in self.dictionaries))
        for result in self.comparisons:
            for name, nearest in ((result.a, result.in_b), (result.b, result.in_a)):
                require(name in by_name, "a comparison's dictionary", "be one of them", name)
                require_length("a comparison", nearest, by_name[name].d_sae, "latent")
