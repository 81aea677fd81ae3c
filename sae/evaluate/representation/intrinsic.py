"""Intrinsic dimension of a set of rows from the distances to the two nearest neighbours."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

CELLS_AT_ONCE = 1 << 24
"""float64 differences that are held at once."""


class IntrinsicDimension(NamedTuple):
    """A TwoNN estimate."""

    dimension: float
    """The slope."""
    n_rows: int
    """Rows that it rests on."""
    n_duplicates: int
    """Rows that were left out because their nearest neighbour is the same row."""


def two_nn(x: Float[Tensor, "row d_in"], *, discard: float = 0.1) -> IntrinsicDimension:
    """Slope of -log(1 - F(mu)) on log mu through the origin, mu = r2 / r1 (Facco et al. 2017).

    Distances come from differences in float64: those from matrix products lose the small ones,
    which decide here. The known bias is downwards: 8.8 for a uniform cube of 10 dimensions.

    Args:
        x: Rows.
        discard: Share of the largest mu, which are noisy, that is left out.

    Raises:
        ValueError: If `discard` is not in 0..1 or fewer than 10 rows differ from their neighbours.
    """
    if not 0 <= discard < 1:
        raise ValueError(f"discard must be at least 0 and below 1, got {discard}")
    nearest = nearest_distances(x.detach().double())
    distinct = nearest[:, 0] > 0
    n = int(distinct.sum())
    if n < 10:
        raise ValueError(f"x must have at least 10 rows that differ, got {n}; take more rows")
    mu = (nearest[distinct, 1] / nearest[distinct, 0]).sort().values
    tail = -torch.log1p(-torch.arange(1, n + 1, dtype=torch.float64) / (n + 1))
    kept = max(2, int(n * (1 - discard)))
    log_mu, tail = mu[:kept].log(), tail[:kept]
    slope = (log_mu @ tail) / (log_mu @ log_mu)
    return IntrinsicDimension(float(slope), n, len(x) - n)


def nearest_distances(x: Float64[Tensor, "row d_in"]) -> Float64[Tensor, "row 2"]:
    """Distances of each row to the two nearest others.

    Raises:
        ValueError: If there are fewer than 3 rows.
    """
    n, d_in = x.shape
    if n < 3:
        raise ValueError(f"x must have at least 3 rows, got {n}")
    step = max(1, CELLS_AT_ONCE // (n * d_in))
    found = []
    for start in range(0, n, step):
        squares = (x[start : start + step, None] - x).square().sum(dim=2)
        own = torch.arange(start, min(start + step, n))
        squares[own - start, own] = torch.inf
        found.append(squares.topk(2, dim=1, largest=False).values.sqrt())
    return torch.cat(found)
