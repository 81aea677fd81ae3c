"""The shape of one set of rows: effective rank, heavy tails, and the gap between two sets."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sae.evaluate.representation.paired import centred

EPS = 1e-7
"""Added to each share of RankMe, as its paper does."""


class Outliers(NamedTuple):
    """Dimensions that are larger than the others."""

    dimensions: Int64[Tensor, " outlier"]
    """Their numbers, the largest first."""
    ratio: Float64[Tensor, " outlier"]
    """Root mean square over that of the median dimension."""


def rankme(x: Float[Tensor, "row d_in"]) -> float:
    """exp(-sum p log p), p_k = sigma_k / sum sigma + 1e-7, of the rows as they are.

    Garrido et al. 2023 (arXiv 2210.02885): k equal singular values give k. Centre the rows first to
    leave a mean that dwarfs the rest out of it.

    Raises:
        ValueError: If all rows are 0 or there are none.
    """
    sizes = torch.linalg.svdvals(x.detach().double())
    if sizes.numel() == 0 or float(sizes[0]) == 0:
        raise ValueError(f"x must have a row other than 0, got {len(x)} rows of 0")
    p = sizes / sizes.sum() + EPS
    return float((-(p * p.log()).sum()).exp())


def kurtosis(x: Float[Tensor, "row d_in"]) -> Float64[Tensor, " d_in"]:
    """E z^4 / (E z^2)^2 of each centred dimension: 3 for a Gaussian; nan where it does not vary."""
    z = centred(x.detach().double())
    return z.pow(4).mean(dim=0) / z.square().mean(dim=0).square()


def outlier_dimensions(x: Float[Tensor, "row d_in"], ratio: float = 6.0) -> Outliers:
    """Dimensions whose root mean square is above `ratio` times that of the median dimension.

    A privileged basis shows by them and by their kurtosis; a random rotation removes both
    (Crabbé et al. 2024).

    Raises:
        ValueError: If ratio is not above 1 or more than half of the dimensions are 0.
    """
    if ratio <= 1:
        raise ValueError(f"ratio must be above 1, got {ratio}")
    sizes = x.detach().double().square().mean(dim=0).sqrt()
    median = sizes.median()
    if float(median) == 0:
        raise ValueError("x must not be 0 in half of its dimensions, got such rows")
    order = (sizes / median).sort(descending=True)
    n_large = int((order.values > ratio).sum())
    return Outliers(order.indices[:n_large], order.values[:n_large])


def modality_gap(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"], *, unit: bool = True
) -> float:
    """||mean(x) - mean(y)||, of rows scaled to norm 1 unless `unit` is false.

    Liang et al. 2022 (arXiv 2203.02053).

    Raises:
        ValueError: If the widths differ or a side has no row.
    """
    if x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(
            f"x and y must have rows of one width, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    sides = [rows.detach().double() for rows in (x, y)]
    if unit:
        sides = [torch.nn.functional.normalize(rows, dim=1) for rows in sides]
    return float((sides[0].mean(dim=0) - sides[1].mean(dim=0)).norm())
