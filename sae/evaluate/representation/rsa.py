"""RSA: rank correlation of the dissimilarities that two sets of rows give the same examples."""

from typing import Literal, assert_never

import torch
from jaxtyping import Float, Float64
from scipy import stats
from torch import Tensor

from sae.evaluate.representation.paired import paired

Dissimilarity = Literal["euclidean", "cosine", "correlation"]


def rsa(
    x: Float[Tensor, "row d_in"],
    y: Float[Tensor, "other d_out"],
    dissimilarity: Dissimilarity = "euclidean",
) -> float:
    """Spearman correlation of the upper triangles of both dissimilarity matrices.

    Kriegeskorte et al. 2008. "euclidean" does not see rotations and shifts; "correlation", the
    customary 1 - Pearson between two rows, sees rotations because it centres each row.

    Returns:
        -1..1; nan where all dissimilarities of a side are equal.

    Raises:
        ValueError: If the sides do not have the same rows, or fewer than 3.
    """
    pair = paired(x, y, at_least=3)
    above = torch.triu_indices(len(pair.x), len(pair.x), offset=1).unbind()
    sides = [dissimilarities(rows, dissimilarity)[above] for rows in pair]
    ranks = [torch.from_numpy(stats.rankdata(side.numpy())).double() for side in sides]
    a, b = (rank - rank.mean() for rank in ranks)
    return float(a @ b / (a.norm() * b.norm()))


def dissimilarities(
    x: Float64[Tensor, "row d_in"], dissimilarity: Dissimilarity = "euclidean"
) -> Float64[Tensor, "row row"]:
    """The dissimilarity of every pair of rows; a row of norm 0 has cosine 0 with all others."""
    match dissimilarity:
        case "euclidean":
            return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        case "cosine":
            unit = torch.nn.functional.normalize(x, dim=1, eps=torch.finfo(x.dtype).tiny)
            return 1 - unit @ unit.T
        case "correlation":
            return dissimilarities(x - x.mean(dim=1, keepdim=True), "cosine")
        case _:
            assert_never(dissimilarity)
