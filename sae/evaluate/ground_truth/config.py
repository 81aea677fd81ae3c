"""What a world with known features is made of, as frozen configs and tiers; no torch here.

The recipe is SynthSAEBench's (Chanin and Garriga-Alonso 2026, arXiv 2602.14687). A world made here
follows the same distribution as the published one; it is not the published checkpoint.
"""

from dataclasses import dataclass
from typing import Literal

from monosema.checks import all_at_least, at_least, fraction, positive, require


@dataclass(frozen=True, kw_only=True)
class Orthogonalised:
    """Random unit directions, moved apart by Adam on the sum of their squared overlaps."""

    kind: Literal["orthogonalised"] = "orthogonalised"
    """Tells the geometries apart."""
    steps: int = 100
    """Steps of Adam; 0 leaves the directions random."""
    lr: float = 3e-4
    """Learning rate of these steps."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("steps", self.steps, 0)
        positive("lr", self.lr)


@dataclass(frozen=True, kw_only=True)
class ToyModel:
    """Directions that a toy model of superposition learns (Elhage et al. 2022).

    x' = relu(W^T W x + b) is trained to give back sparse x, weighted by importance; features that
    it does not represent (norm below 0.5) are no part of the world.
    """

    kind: Literal["toy_model"] = "toy_model"
    """Tells the geometries apart."""
    importance: float = 1.0
    """Importance of each feature over that of the one before."""
    steps: int = 2000
    """Training steps."""
    restarts: int = 8
    """Models that are trained side by side; the one of the smallest loss is taken."""

    def __post_init__(self) -> None:
        """Check ranges."""
        positive("importance", self.importance)
        at_least("steps", self.steps, 1)
        at_least("restarts", self.restarts, 1)


@dataclass(frozen=True, kw_only=True)
class Zipf:
    """Firing probabilities rank^-exponent, brought linearly to the range lowest..highest."""

    exponent: float = 0.5
    """How fast they fall; 0 with highest = lowest for uniform ones."""
    highest: float = 0.4
    """Of the most frequent feature."""
    lowest: float = 5e-4
    """Of the rarest feature."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("exponent", self.exponent, 0)
        positive("lowest", self.lowest)
        fraction("highest", self.highest)
        rule = f"be at least lowest={self.lowest}"
        require(self.highest >= self.lowest, "highest", rule, self.highest)


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Features fire together by a Gaussian copula whose correlation is of low rank."""

    rank: int = 25
    """Common causes."""
    scale: float = 0.1
    """Standard deviation of a feature's weight on a cause."""

    def __post_init__(self) -> None:
        """Check ranges; a feature's own share of its variance must stay positive."""
        at_least("rank", self.rank, 1)
        at_least("scale", self.scale, 0)
        rule = f"be below 1 / sqrt(rank={self.rank})"
        require(self.scale**2 * self.rank < 1, "scale", rule, self.scale)


@dataclass(frozen=True, kw_only=True)
class Hierarchy:
    """Trees over the first features, breadth first: a child fires only where its parent fires."""

    n_roots: int = 128
    """Trees."""
    branching: int = 4
    """Children of each parent."""
    depth: int = 3
    """Levels below the roots."""
    exclusive: bool = True
    """At most one child of a parent fires in a row."""
    scaled: bool = True
    """A child's activation is multiplied by its parent's, over the parent's mean."""

    def __post_init__(self) -> None:
        """Check ranges."""
        all_at_least(self, n_roots=1, branching=1, depth=1)

    @property
    def size(self) -> int:
        """Features in the trees."""
        return sum(self.n_roots * self.branching**level for level in range(self.depth + 1))


@dataclass(frozen=True, kw_only=True)
class Normal:
    """max(0, normal) activations; means fall linearly with the rank, spreads are folded normal."""

    kind: Literal["normal"] = "normal"
    """Tells the magnitudes apart."""
    first: float = 5.0
    """Mean activation of the most frequent feature."""
    last: float = 4.0
    """Mean activation of the rarest feature."""
    std_mean: float = 0.5
    """The features' standard deviations are |normal(std_mean, std_std)|."""
    std_std: float = 0.5
    """See std_mean."""

    def __post_init__(self) -> None:
        """Check ranges."""
        positive("first", self.first)
        positive("last", self.last)
        at_least("std_mean", self.std_mean, 0)
        at_least("std_std", self.std_std, 0)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Activations between 0 and 1, each as likely; times the direction's norm."""

    kind: Literal["uniform"] = "uniform"
    """Tells the magnitudes apart."""


_ORTHOGONALISED, _ZIPF, _NORMAL = Orthogonalised(), Zipf(), Normal()


@dataclass(frozen=True, kw_only=True)
class GroundTruthConfig:
    """A world: x = bias + sum_i a_i direction_i + noise, with sparse a that is known."""

    n_features: int
    """Features; the first is the most frequent."""
    d_model: int
    """Width of the rows."""
    geometry: Orthogonalised | ToyModel = _ORTHOGONALISED
    """How the directions lie."""
    firing: Zipf = _ZIPF
    """How often features fire, before hierarchy and exclusion take from it."""
    correlation: Correlation | None = None
    """Which features fire together; independent ones when absent."""
    hierarchy: Hierarchy | None = None
    """Which features need another; none when absent."""
    magnitude: Normal | Uniform = _NORMAL
    """How strongly features fire."""
    bias: float = 0.0
    """Norm of a vector that is added to every row."""
    noise: float = 0.0
    """Standard deviation, in each dimension, of noise that is added to every row."""
    n_rows: int = 20_000
    """Rows that a dictionary is scored on."""

    def __post_init__(self) -> None:
        """Check ranges, and the fields against each other."""
        all_at_least(self, n_features=1, d_model=1, n_rows=1, bias=0, noise=0)
        if self.hierarchy is not None:
            rule = f"fit into n_features={self.n_features}"
            fits = self.hierarchy.size <= self.n_features
            require(fits, "hierarchy", rule, self.hierarchy.size)
            whole = isinstance(self.geometry, Orthogonalised)
            require(whole, "hierarchy", "be absent beside a toy model's geometry", self.hierarchy)


_PLANTED = Normal(first=1.0, last=1.0, std_mean=0.25, std_std=0.0)

TIERS: dict[str, GroundTruthConfig] = {
    "pentagon": GroundTruthConfig(
        n_features=5,
        d_model=2,
        geometry=ToyModel(),
        firing=Zipf(exponent=0.0, highest=0.05, lowest=0.05),
        magnitude=Uniform(),
    ),
    "toy": GroundTruthConfig(
        n_features=64,
        d_model=16,
        geometry=ToyModel(importance=0.95),
        firing=Zipf(exponent=0.0, highest=0.03, lowest=0.03),
        magnitude=Uniform(),
    ),
    "planted": GroundTruthConfig(
        n_features=448,
        d_model=96,
        firing=Zipf(highest=0.166, lowest=0.008),
        magnitude=_PLANTED,
        noise=0.05,
    ),
    "planted-uniform": GroundTruthConfig(
        n_features=448,
        d_model=56,
        firing=Zipf(exponent=0.0, highest=4 / 448, lowest=4 / 448),
        magnitude=_PLANTED,
        noise=0.05,
    ),
    "ci": GroundTruthConfig(
        n_features=211,
        d_model=37,
        firing=Zipf(highest=0.15, lowest=0.005),
        correlation=Correlation(rank=5),
        hierarchy=Hierarchy(n_roots=11, branching=2, depth=2),
        bias=0.5,
        noise=0.1,
    ),
    "small": GroundTruthConfig(
        n_features=1024,
        d_model=128,
        firing=Zipf(highest=0.3, lowest=0.002),
        correlation=Correlation(rank=11),
        hierarchy=Hierarchy(n_roots=16, branching=4, depth=2),
        bias=0.5,
        noise=0.1,
        n_rows=100_000,
    ),
    "full": GroundTruthConfig(
        n_features=16_384,
        d_model=768,
        correlation=Correlation(),
        hierarchy=Hierarchy(),
        bias=0.5,
        n_rows=500_000,
    ),
}
"""Worlds by name: two toys of seconds, the flat `planted` ones and `ci` of a minute, `small` of
minutes, `full` (a GPU) of an hour."""
