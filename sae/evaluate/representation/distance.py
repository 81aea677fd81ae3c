"""Distance correlation: dependence of any kind between two sets of rows."""

import math

from jaxtyping import Float, Float64
from torch import Tensor

from sae.evaluate.representation.paired import paired
from sae.evaluate.representation.rsa import dissimilarities


def distance_correlation(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"], *, debiased: bool = True
) -> float:
    """<A, B> / sqrt(<A, A> <B, B>) of the centred Euclidean distances between rows.

    Székely et al. 2007, the squared form; debiased as in Székely and Rizzo 2013, without which
    independent rows of many dimensions come out near 1. It is 0 for independent rows only, so it
    sees what no correlation does, and 1 for a rotated, scaled and shifted copy.

    Returns:
        At most 1; nan where all rows of a side are equal. Debiased it may fall below 0.

    Raises:
        ValueError: If the sides do not have the same rows, or fewer than 4.
    """
    pair = paired(x, y, at_least=4)
    a, b = (_centred(dissimilarities(rows), debiased) for rows in pair)
    norm = float((a * a).sum() * (b * b).sum())
    return float((a * b).sum()) / math.sqrt(norm) if norm > 0 else math.nan


def _centred(distance: Float64[Tensor, "row row"], debiased: bool) -> Float64[Tensor, "row row"]:
    """Rows and columns of mean 0; debiased over the entries beside the diagonal alone."""
    if not debiased:
        means = distance.mean(dim=0)
        return distance - means - means[:, None] + distance.mean()
    n = len(distance)
    sums = distance.sum(dim=0)
    found = distance - (sums + sums[:, None]) / (n - 2) + distance.sum() / ((n - 1) * (n - 2))
    return found.fill_diagonal_(0.0)
