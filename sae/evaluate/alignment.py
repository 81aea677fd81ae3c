"""Relative representations and ASIF: comparing spaces by their similarities to shared anchors.

Stitching: whether what reads one stream can go on with another, through a linear map.

What all measures of two sets of rows share: the check, centring, and the chance floor.

Which unit of one space is which of another: correlations over shared rows, one to one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from monosema.checks import MonosemaError

Measure = Callable[[Tensor, Tensor], float]
"""From two sets of rows of the same examples to a figure."""


class Pair(NamedTuple):
    """Two sets of rows of the same examples, in float64."""

    x: Float64[Tensor, "row d_in"]
    y: Float64[Tensor, "row d_out"]


class Null(NamedTuple):
    """A figure beside what it is when rows of one side are exchanged at random."""

    value: float
    """The figure of the rows as they are paired."""
    floor: float
    """Mean over the permutations."""
    high: float
    """95 % quantile over the permutations."""
    p: float
    """Share of the permutations, the identity among them, that reach the figure."""


def paired(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"], at_least: int = 2
) -> Pair:
    """Both sides in float64.

    Raises:
        ValueError: If they do not hold the same examples, too few, or what is not finite.
    """
    if len(x) != len(y):
        raise MonosemaError(
            f"x and y must have a row for each of the same examples, got {len(x)} and {len(y)} rows"
        )
    if len(x) < at_least:
        raise MonosemaError(f"x and y must have at least {at_least} rows, got {len(x)}")
    for name, rows in (("x", x), ("y", y)):
        if not bool(rows.isfinite().all()):
            raise MonosemaError(f"{name} must be finite, got nan or inf; leave these rows out")
    return Pair(x.detach().double(), y.detach().double())


def centred(x: Float64[Tensor, "row d_in"]) -> Float64[Tensor, "row d_in"]:
    """Rows less their mean row."""
    return x - x.mean(dim=0)


def permutation_null(
    measure: Measure,
    x: Float[Tensor, "row d_in"],
    y: Float[Tensor, "row d_out"],
    *,
    n_permutations: int,
    generator: torch.Generator,
) -> Null:
    """Measure as paired, and with the rows of y exchanged: the chance floor of any measure.

    Args:
        measure: Larger must mean more alike.
        x: One side.
        y: The other side.
        n_permutations: How often the rows of y are exchanged.
        generator: The only source of randomness.

    Raises:
        ValueError: If there is no permutation, or the sides do not fit each other.
    """
    if n_permutations < 1:
        raise MonosemaError(f"n_permutations must be at least 1, got {n_permutations}")
    pair = paired(x, y)
    value = measure(*pair)
    result = torch.tensor(
        [
            measure(pair.x, pair.y[torch.randperm(len(x), generator=generator)])
            for _ in range(n_permutations)
        ],
        dtype=torch.float64,
    )
    reached = 1 + int((result >= value).sum())
    high = float(torch.quantile(result, 0.95))
    return Null(value, float(result.mean()), high, reached / (1 + n_permutations))


def relative(
    x: Float[Tensor, "row d_in"], anchors: Float[Tensor, "anchor d_in"]
) -> Float64[Tensor, "row anchor"]:
    """Cosine of every row with every anchor (Moschella et al. 2023, arXiv 2209.15430).

    Rows of two spaces that are rotated copies of each other get the same relative rows, if the
    anchors are the same examples.

    Raises:
        ValueError: If a row or an anchor has norm 0, and so no direction.
    """
    sides = (x.detach().double(), anchors.detach().double())
    for name, rows in zip(("x", "anchors"), sides, strict=True):
        if not bool((rows.norm(dim=1) > 0).all()):
            raise MonosemaError(f"{name} must have no row of norm 0, got one; leave it out")
    unit, unit_anchors = (rows / rows.norm(dim=1, keepdim=True) for rows in sides)
    return unit @ unit_anchors.T


def sparse_relative(
    rows: Float64[Tensor, "row anchor"], k: int, power: float = 1.0
) -> Float64[Tensor, "row anchor"]:
    """Keep the k largest of each relative row, raise them to a power and scale to norm 1.

    Raises:
        ValueError: If k is not in 1..anchors.
    """
    if not 1 <= k <= rows.shape[1]:
        raise MonosemaError(f"k must be in 1..{rows.shape[1]}, the number of anchors, got {k}")
    top = rows.clamp_min(0).topk(k, dim=1)
    largest = torch.zeros_like(rows).scatter_(1, top.indices, top.values**power)
    return torch.nn.functional.normalize(largest, dim=1, eps=torch.finfo(rows.dtype).tiny)


def asif(
    x: Float[Tensor, "row d_in"],
    candidates: Float[Tensor, "candidate d_out"],
    anchors_x: Float[Tensor, "anchor d_in"],
    anchors_y: Float[Tensor, "other d_out"],
    *,
    k: int,
    power: float = 1.0,
) -> Int[Tensor, " row"]:
    """The candidate of the other space for each row, without any training.

    Both sides become sparse relative rows over anchors that are paired, and are compared by cosine
    (Norelli et al. 2023, arXiv 2210.01738).

    Args:
        x: Rows, such as embeddings of images.
        candidates: What they are matched with, such as embeddings of captions.
        anchors_x: Anchors in the space of x.
        anchors_y: The same anchors in the space of the candidates.
        k: Anchors that are kept of each.
        power: What the kept similarities are raised to.

    Raises:
        ValueError: If the anchors are not paired, or k is out of range.
    """
    paired(anchors_x, anchors_y)
    sparse_x = sparse_relative(relative(x, anchors_x), k, power)
    others = sparse_relative(relative(candidates, anchors_y), k, power)
    return (sparse_x @ others.T).argmax(dim=1)


class Stitch(NamedTuple):
    """An affine map from rows of one space to rows of another."""

    weight: Float64[Tensor, "d_in d_out"]
    bias: Float64[Tensor, " d_out"]

    def __call__(self, x: Float[Tensor, "row d_in"]) -> Float64[Tensor, "row d_out"]:
        """Map rows."""
        return x.double() @ self.weight + self.bias


class Stitched(NamedTuple):
    """What reading stitched rows costs."""

    loss: float
    """With the rows that the reader was made for."""
    loss_stitched: float
    """With the other rows, mapped."""
    loss_mean: float
    """With the mean row: what a map that carries nothing gives."""


def fit_stitch(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"], *, ridge: float = 1e-6
) -> Stitch:
    """Least squares with a small ridge, relative to the mean variance of x.

    Raises:
        ValueError: If the sides do not have the same rows.
    """
    pair = paired(x, y)
    mean_x, mean_y = pair.x.mean(dim=0), pair.y.mean(dim=0)
    a, b = pair.x - mean_x, pair.y - mean_y
    gram = a.T @ a
    gram = gram + torch.eye(len(gram), dtype=gram.dtype) * (ridge * gram.diag().mean() + 1e-30)
    weight = torch.linalg.solve(gram, a.T @ b)
    return Stitch(weight, mean_y - mean_x @ weight)


def stitching_loss(
    reader: Callable[[Tensor], float],
    stitch: Stitch,
    x: Float[Tensor, "row d_in"],
    y: Float[Tensor, "other d_out"],
) -> Stitched:
    """The loss of a reader of y with y, with stitched x and with the mean of y.

    Lenc and Vedaldi 2015; Bansal et al. 2021 (arXiv 2106.07682).

    Args:
        reader: From rows of y's space to a loss, such as the rest of a model.
        stitch: Fitted on other rows than these.
        x: Rows of the other space.
        y: Rows of the same examples in the reader's space.

    Raises:
        ValueError: If the sides do not have the same rows.
    """
    pair = paired(x, y)
    mean = pair.y.mean(dim=0).expand_as(pair.y)
    return Stitched(reader(pair.y), reader(stitch(pair.x)), reader(mean))


class Match(NamedTuple):
    """A one-to-one assignment of units."""

    x: Int64[Tensor, " pair"]
    """Units of the first space, ascending."""
    y: Int64[Tensor, " pair"]
    """The unit of the second space that each is matched with."""
    values: Float64[Tensor, " pair"]
    """How alike they are."""


class Correlations:
    """Pearson correlation of every unit of one space with every unit of another, streamed."""

    def __init__(self, d_in: int, d_out: int) -> None:
        """Start with no rows; memory is one (d_in, d_out) matrix of float64."""
        self.n_rows = 0
        self._mean_x = torch.zeros(d_in, dtype=torch.float64)
        self._mean_y = torch.zeros(d_out, dtype=torch.float64)
        self._spread_x = torch.zeros(d_in, dtype=torch.float64)
        self._spread_y = torch.zeros(d_out, dtype=torch.float64)
        self._cross = torch.zeros(d_in, d_out, dtype=torch.float64)

    def update(self, x: Float[Tensor, "batch d_in"], y: Float[Tensor, "other d_out"]) -> None:
        """Add the activations of the same rows in both spaces.

        Raises:
            ValueError: If they are not of the same rows.
        """
        if len(x) != len(y):
            raise MonosemaError(
                f"x and y must be of the same rows, got {len(x)} and {len(y)}; pair them first"
            )
        if len(x) == 0:
            return
        batch = Correlations(x.shape[1], y.shape[1])
        a, b = x.detach().double(), y.detach().double()
        batch.n_rows = len(a)
        batch._mean_x, batch._mean_y = a.mean(dim=0), b.mean(dim=0)
        a, b = a - batch._mean_x, b - batch._mean_y
        batch._spread_x, batch._spread_y = a.square().sum(dim=0), b.square().sum(dim=0)
        batch._cross = a.T @ b
        self.merge(batch)

    def merge(self, other: "Correlations") -> None:
        """Add the rows that `other` has seen (Chan et al. 1979)."""
        total = self.n_rows + other.n_rows
        if total == 0:
            return
        step_x, step_y = other._mean_x - self._mean_x, other._mean_y - self._mean_y
        between = self.n_rows * other.n_rows / total
        self._spread_x += other._spread_x + step_x.square() * between
        self._spread_y += other._spread_y + step_y.square() * between
        self._cross += other._cross + step_x[:, None] * step_y * between
        self._mean_x += step_x * (other.n_rows / total)
        self._mean_y += step_y * (other.n_rows / total)
        self.n_rows = total

    def compute(self) -> Float64[Tensor, "d_in d_out"]:
        """Correlations; 0 for a unit that does not vary."""
        size = self._spread_x.sqrt()[:, None] * self._spread_y.sqrt()
        return (self._cross / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp(-1, 1)


def match(values: Float[Tensor, "d_in d_out"]) -> Match:
    """The assignment of the largest sum, each unit used at most once (Hungarian, exact).

    It takes about n^3 steps: seconds at 4,000 units, an hour beyond 16,000.
    """
    rows, columns = (torch.from_numpy(n).long() for n in _assignment(values))
    return Match(rows, columns, values[rows, columns].double())


def _assignment(values: Float[Tensor, "d_in d_out"]) -> tuple:
    return linear_sum_assignment(values.detach().double().cpu().numpy(), maximize=True)
