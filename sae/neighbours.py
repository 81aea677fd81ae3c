"""Neighbours by decoder cosine, inside a dictionary and across widths; feature splitting."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from monosema.checks import MonosemaError

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
    excluded: Int[Tensor, " batch"] | None = None,
) -> Nearest:
    """The k closest of `among` for every row, a chunk at a time.

    Args:
        rows: Decoder rows.
        among: Decoder rows of the same or another dictionary over the same stream.
        k: How many.
        excluded: For each row its own number in `among`: it is not its own neighbour.

    Raises:
        ValueError: If widths differ or there are fewer than k.
    """
    if rows.shape[1] != among.shape[1]:
        raise MonosemaError(f"rows must be as wide as among, {among.shape[1]}, got {rows.shape[1]}")
    most = len(among) - (excluded is not None)
    if not 1 <= k <= most:
        raise MonosemaError(f"k must lie between 1 and {most}, got {k}")
    known = torch.nn.functional.normalize(among, dim=1).T
    parts, first = [], 0
    for chunk in torch.nn.functional.normalize(rows, dim=1).split(max(1, _CELLS // len(among))):
        cosine = chunk @ known
        if excluded is not None:
            cosine[torch.arange(len(chunk)), excluded[first : first + len(chunk)]] = -torch.inf
        parts.append(cosine.topk(k, dim=1))
        first += len(chunk)
    return Nearest(torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts]))


def chance_cosine(
    dec_rows: Float[Tensor, "d_sae d_out"], *, n_random: int = 1000, seed: int = 0
) -> float:
    """Below it lie 95 % of the cosines of random directions with their nearest latent.

    NumPy draws them: torch with the seed of a dictionary would draw its initial decoder again.
    """
    drawn = np.random.default_rng(seed).standard_normal((n_random, dec_rows.shape[1]))
    random = torch.from_numpy(drawn).to(dec_rows)
    return float(nearest(random, dec_rows, 1).cosine.quantile(0.95))


RELATED = 0.5
"""Cosine below which a latent of the wider dictionary descends from none of the narrower."""


class Splitting(NamedTuple):
    """How the latents of a wider dictionary descend from those of a narrower one."""

    parent: Int[Tensor, " other"]
    """For each latent of the wider: the narrower's latent of the largest cosine, or -1."""
    cosine: Float[Tensor, " other"]
    """The cosine of the two."""
    n_children: Int[Tensor, " d_sae"]
    """For each latent of the narrower."""

    @property
    def split(self) -> float:
        """Share of the narrower's latents with at least two children."""
        return float((self.n_children >= 2).double().mean())

    @property
    def novel(self) -> float:
        """Share of the wider's latents without a parent: features that the narrower misses."""
        return float((self.parent < 0).double().mean())


@torch.no_grad()
def splitting(
    narrow: Float[Tensor, "d_sae d_model"],
    wide: Float[Tensor, "other d_in"],
    related: float = RELATED,
) -> Splitting:
    """Give every latent of a wider dictionary its parent in a narrower one.

    The neighbourhoods of Scaling Monosemanticity (arXiv 2605.29358) as counts. That a latent has
    several children says that the wide dictionary divides its direction, not that the parts mean
    something: chance gives cosines too (print `related` beside its floor).

    Raises:
        ValueError: If the widths of the rows differ, or `related` is not in 0..1.
    """
    if not 0 <= related <= 1:
        raise MonosemaError(f"related must be in 0..1, got {related}")
    result = nearest(wide, narrow, 1)
    cosine = result.cosine[:, 0]
    parent = torch.where(cosine >= related, result.latent[:, 0], -1)
    n_children = torch.bincount(parent[parent >= 0], minlength=len(narrow))
    return Splitting(parent, cosine, n_children)
