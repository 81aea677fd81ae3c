"""SVCCA and PWCCA: correlations of the best matched directions of two sets of rows."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sae.evaluate.representation.paired import centred, paired

SMALL = 1e-10
"""Singular values below this share of the largest one count as 0."""


class Basis(NamedTuple):
    """What is kept of one side."""

    q: Float64[Tensor, "row k"]
    """Orthonormal columns that span it."""
    rows: Float64[Tensor, "row d_in"]
    """The centred rows."""


def svcca(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"], *, variance: float = 0.99
) -> float:
    """Mean canonical correlation of the leading principal components of both sides.

    Kept are the fewest components with `variance` of each side's variance (Raghu et al. 2017, arXiv
    1706.05806).

    Raises:
        ValueError: If the sides do not have the same rows, `variance` is not in (0, 1], or there
            are too few rows for a correlation to say anything.
    """
    if not 0 < variance <= 1:
        raise ValueError(f"variance must be above 0 and at most 1, got {variance}")
    pair = paired(x, y)
    _, correlations, _ = _canonical(_basis(pair.x, variance), _basis(pair.y, variance))
    return float(correlations.mean())


def pwcca(x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"]) -> float:
    """Canonical correlations weighted by how much of x each direction accounts for.

    weight_i = sum_j |<h_i, x_j>| over the columns x_j, h_i the i-th canonical variate of x (Morcos
    et al. 2018, arXiv 1806.05759). Not symmetric: the weights are those of x.

    Raises:
        ValueError: If the sides do not have the same rows, or too few of them.
    """
    pair = paired(x, y)
    basis = _basis(pair.x, 1.0)
    left, correlations, _ = _canonical(basis, _basis(pair.y, 1.0))
    variates = basis.q @ left  # (row, k)
    weights = (variates.T @ basis.rows).abs().sum(dim=1)
    return float((weights * correlations).sum() / weights.sum())


def _basis(rows: Float64[Tensor, "row d_in"], variance: float) -> Basis:
    rows = centred(rows)
    u, sizes, _ = torch.linalg.svd(rows, full_matrices=False)
    share = sizes.square().cumsum(0) / sizes.square().sum()
    kept = min(int((share < variance - 1e-12).sum()) + 1, int((sizes > SMALL * sizes[0]).sum()))
    return Basis(u[:, :kept], rows)


def _canonical(x: Basis, y: Basis) -> tuple[Tensor, Tensor, Tensor]:
    n_rows, n_directions = len(x.q), x.q.shape[1] + y.q.shape[1]
    if min(x.q.shape[1], y.q.shape[1]) == 0 or n_rows <= n_directions:
        raise ValueError(
            f"canonical correlations must have more rows than directions of both sides "
            f"({n_directions}) and sides that vary, got {n_rows} rows; take more rows"
        )
    left, correlations, right = torch.linalg.svd(x.q.T @ y.q, full_matrices=False)
    return left, correlations.clamp_max(1), right
