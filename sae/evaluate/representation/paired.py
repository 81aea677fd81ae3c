"""What all measures of two sets of rows share: the check, centring, and the chance floor."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

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
        raise ValueError(
            f"x and y must have a row for each of the same examples, got {len(x)} and {len(y)} rows"
        )
    if len(x) < at_least:
        raise ValueError(f"x and y must have at least {at_least} rows, got {len(x)}")
    for name, rows in (("x", x), ("y", y)):
        if not bool(rows.isfinite().all()):
            raise ValueError(f"{name} must be finite, got nan or inf; leave these rows out")
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
        raise ValueError(f"n_permutations must be at least 1, got {n_permutations}")
    pair = paired(x, y)
    value = measure(*pair)
    found = torch.tensor(
        [
            measure(pair.x, pair.y[torch.randperm(len(x), generator=generator)])
            for _ in range(n_permutations)
        ],
        dtype=torch.float64,
    )
    reached = 1 + int((found >= value).sum())
    high = float(torch.quantile(found, 0.95))
    return Null(value, float(found.mean()), high, reached / (1 + n_permutations))
