"""Relative representations and ASIF: comparing spaces by their similarities to shared anchors."""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from sae.evaluate.representation.paired import paired


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
            raise ValueError(f"{name} must have no row of norm 0, got one; leave it out")
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
        raise ValueError(f"k must be in 1..{rows.shape[1]}, the number of anchors, got {k}")
    top = rows.clamp_min(0).topk(k, dim=1)
    kept = torch.zeros_like(rows).scatter_(1, top.indices, top.values**power)
    return torch.nn.functional.normalize(kept, dim=1, eps=torch.finfo(rows.dtype).tiny)


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
    own = sparse_relative(relative(x, anchors_x), k, power)
    others = sparse_relative(relative(candidates, anchors_y), k, power)
    return (own @ others.T).argmax(dim=1)
