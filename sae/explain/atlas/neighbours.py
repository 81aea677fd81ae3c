"""Neighbours by decoder cosine, inside a dictionary and across widths; feature splitting."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

_CELLS = 1 << 24


class Nearest(NamedTuple):
    """The closest latents, best first."""

    latent: Int[Tensor, "batch k"]
    """Their numbers."""
    cosine: Float[Tensor, "batch k"]
    """Cosines of the decoder rows."""


def nearest(
    rows: Float[Tensor, "batch d_out"],
    among: Float[Tensor, "d_sae d_in"],
    k: int,
    *,
    same: bool = False,
) -> Nearest:
    """The k closest of `among` for every row, a chunk at a time.

    Args:
        rows: Decoder rows.
        among: Decoder rows of the same or another dictionary over the same stream.
        k: How many.
        same: Whether row i is `among[i]`, which is then not its own neighbour.

    Raises:
        ValueError: If widths differ or there are fewer than k.
    """
    if rows.shape[1] != among.shape[1]:
        raise ValueError(f"rows must be as wide as among, {among.shape[1]}, got {rows.shape[1]}")
    if not 1 <= k <= len(among) - same:
        raise ValueError(f"k must lie between 1 and {len(among) - same}, got {k}")
    known = torch.nn.functional.normalize(among, dim=1).T
    parts, first = [], 0
    for chunk in torch.nn.functional.normalize(rows, dim=1).split(max(1, _CELLS // len(among))):
        cosine = chunk @ known
        if same:
            own = torch.arange(len(chunk))
            cosine[own, first + own] = -torch.inf
        parts.append(cosine.topk(k, dim=1))
        first += len(chunk)
    return Nearest(torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts]))


class Splitting(NamedTuple):
    """How latents of a narrow dictionary spread over a wide one."""

    parent: Int[Tensor, " d_sae"]
    """For each wide latent its closest narrow one."""
    cosine: Float[Tensor, " d_sae"]
    """The cosine of the two."""
    n_children: Int[Tensor, " batch"]
    """For each narrow latent the wide ones that have it as parent."""
    is_new: Float[Tensor, " d_sae"]
    """1 for wide latents without a parent: concepts that the narrow dictionary lacks."""


def splitting(
    narrow: Float[Tensor, "batch d_out"], wide: Float[Tensor, "d_sae d_out"], least: float = 0.5
) -> Splitting:
    """Give every wide latent its parent; below `least` it has none.

    That a latent has several children says that the wide dictionary divides its direction, not
    that the parts mean something: chance gives cosines too (print `least` beside its floor).
    """
    found = nearest(wide, narrow, 1)
    cosine = found.cosine[:, 0]
    has = cosine >= least
    children = torch.bincount(found.latent[has, 0], minlength=len(narrow))
    parent = torch.where(has, found.latent[:, 0], -1)
    return Splitting(parent, cosine, children, (~has).float())
