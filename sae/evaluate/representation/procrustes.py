"""Procrustes: how far two sets of rows are from rotated copies of each other."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sae.evaluate.representation.paired import centred, paired


def procrustes_distance(x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"]) -> float:
    """||A||^2 + ||B||^2 - 2 ||A^T B||_* of the centred sides, each scaled to Frobenius norm 1.

    Ding et al. 2021 (arXiv 2108.01661); its root is a shape metric (Williams et al. 2021, arXiv
    2110.14739). Widths may differ: the narrower side counts as padded with zeros.

    Returns:
        0 for rotated, reflected, shifted or scaled copies, at most 2; nan where a side does not
        vary.

    Raises:
        ValueError: If the sides do not have the same rows.
    """
    a, b = (centred(rows) for rows in paired(x, y))
    a, b = a / a.norm(), b / b.norm()
    if not bool(a.isfinite().all() and b.isfinite().all()):
        return float("nan")
    return float((2 - 2 * torch.linalg.svdvals(a.T @ b).sum()).clamp_min(0))


def rotation_onto(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_in"]
) -> Float64[Tensor, "d_in d_in"]:
    """The orthogonal R for which x @ R is nearest to y (Schoenemann 1966); nothing is centred.

    Raises:
        ValueError: If the sides do not have the same rows.
    """
    pair = paired(x, y)
    u, _, v = torch.linalg.svd(pair.x.T @ pair.y)
    return u @ v
