"""Splitting and hedging: what becomes of features in wider and in too narrow dictionaries."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae.evaluate.structure.stability import cosines

RELATED = 0.5
"""Cosine below which a latent of the wider dictionary descends from none of the narrower."""


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """How the latents of a wider dictionary descend from those of a narrower one."""

    parent: Int64[Tensor, " other"]
    """For each latent of the wider: the narrower's latent of the largest cosine, or -1."""
    n_children: Int64[Tensor, " d_sae"]
    """For each latent of the narrower."""
    split: float
    """Share of the narrower's latents with at least two children."""
    novel: float
    """Share of the wider's latents without a parent: features that the narrower misses."""


@torch.no_grad()
def splitting(
    narrow: Float[Tensor, "d_sae d_model"],
    wide: Float[Tensor, "other d_in"],
    related: float = RELATED,
) -> Splitting:
    """Assign the decoder rows of a wider dictionary to those of a narrower one.

    The neighbourhoods of Scaling Monosemanticity (arXiv 2605.29358) as counts.

    Raises:
        ValueError: If the widths of the rows differ, or `related` is not in 0..1.
    """
    if narrow.shape[1] != wide.shape[1]:
        raise ValueError(
            f"decoders must be of one stream, got widths {narrow.shape[1]} and {wide.shape[1]}"
        )
    if not 0 <= related <= 1:
        raise ValueError(f"related must be in 0..1, got {related}")
    best = cosines(wide, narrow).max(dim=1)
    parent = torch.where(best.values >= related, best.indices, -1)
    n_children = torch.bincount(parent[parent >= 0], minlength=len(narrow))
    return Splitting(
        parent=parent,
        n_children=n_children,
        split=float((n_children >= 2).double().mean()),
        novel=float((parent < 0).double().mean()),
    )


def hedging(
    directions: Float[Tensor, "feature d_model"], dec_rows: Float[Tensor, "d_sae d_model"]
) -> Float[Tensor, " d_sae"]:
    """Share of each latent's squared norm along features that have no latent of their own.

    A dictionary that is too narrow mixes correlated features into the latents that it has (Chanin
    et al. 2025, arXiv 2505.11756). Each latent tracks the feature of its largest |cosine|; what is
    left is the part of it within the span of the features that no latent tracks, orthogonal to its
    own feature: sin^2 of the angle for a latent tilted towards one of them. Ours is the form for a
    known truth, not the paper's, which trains a second time.

    Args:
        directions: All true directions.
        dec_rows: The dictionary's decoder rows.
    """
    own = cosines(dec_rows, directions).abs().argmax(dim=1)
    untracked = torch.ones(len(directions), dtype=torch.bool)
    untracked[own] = False
    unit = torch.nn.functional.normalize(dec_rows.double())
    features = torch.nn.functional.normalize(directions.double())
    if not bool(untracked.any()):
        return torch.zeros(len(dec_rows), dtype=torch.float64)
    rest = unit - (unit * features[own]).sum(dim=1, keepdim=True) * features[own]
    basis = torch.linalg.qr(features[untracked].T).Q
    return (rest @ basis).square().sum(dim=1)
