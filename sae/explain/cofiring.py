"""Latents that fire together: the correlation of firing over rows.

Latents beside units of the model, and what a search for safety-relevant latents must say.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor

from activations_cache.checks import Progress, silent
from sae.explain.firings import Codes

_LATENTS_AT_ONCE = 512


class CofiringPairs(NamedTuple):
    """A latent that fires where another one fires."""

    latent: int
    """Its number."""
    correlation: float
    """Phi: the Pearson correlation of firing, 1 or 0, over rows; chance gives 0 at any density."""
    n_rows: int
    """Rows on which both fire."""


def cofiring(
    codes: Codes, k: int, *, least: int = 5, progress: Progress | None = None
) -> list[tuple[CofiringPairs, ...]]:
    """For every latent the k others whose firing correlates most with its own, best first.

    Args:
        codes: Firings on a sample of rows.
        k: How many at most; only positive correlations count.
        least: Rows on which both must fire: fewer say nothing.
        progress: Called after each chunk of latents.
    """
    report = progress or silent
    start = np.append(codes.start, len(codes.row))
    ones = np.ones(len(codes.row), np.float32)  # counts below 2^24 stay exact
    fires = sparse.csr_array((ones, codes.row, start), shape=(codes.d_sae, codes.n_rows))
    by_row = sparse.csr_array(fires.T)
    found: list[tuple[CofiringPairs, ...]] = []
    for first in range(0, codes.d_sae, _LATENTS_AT_ONCE):
        both = sparse.csr_array(fires[first : first + _LATENTS_AT_ONCE] @ by_row)
        for place in range(len(both.indptr) - 1):
            entries = slice(both.indptr[place], both.indptr[place + 1])
            counts = both.data[entries].astype(np.int64)
            found.append(_best(codes, first + place, both.indices[entries], counts, k, least))
        report(len(found), codes.d_sae, "latents' co-firing")
    return found


def _best(
    codes: Codes, latent: int, others: np.ndarray, both: np.ndarray, k: int, least: int
) -> tuple[CofiringPairs, ...]:
    keep = (both >= least) & (others != latent)
    others, both = others[keep], both[keep].astype(np.float64)
    n, own, theirs = codes.n_rows, float(codes.n_fired[latent]), codes.n_fired[others]
    spread = own * (n - own) * theirs * (n - theirs)
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = np.where(spread > 0, (n * both - own * theirs) / np.sqrt(spread), 0.0)
    order = np.lexsort((others, -phi))[:k]
    order = order[phi[order] > 0]
    return tuple(CofiringPairs(int(others[i]), float(phi[i]), int(both[i])) for i in order)


CAUTION = (
    "That a latent exists which fires on such texts says nothing about what the model does, knows "
    "or intends: with enough latents some fire on anything."
)
"""To be shown beside every result of a search for safety-relevant latents."""


class MaxCorrelation:
    """Largest |Pearson correlation| of each latent with any of some units, over streamed rows."""

    def __init__(self, d_sae: int, n_units: int) -> None:
        """Start with no rows; memory is d_sae x n_units."""
        self._n = 0
        self._sums = [torch.zeros(n, dtype=torch.float64) for n in (d_sae, d_sae, n_units, n_units)]
        self._cross = torch.zeros(d_sae, n_units, dtype=torch.float64)

    def update(
        self, acts: Float[Tensor, "batch d_sae"], units: Float[Tensor, "batch d_model"]
    ) -> None:
        """Add rows."""
        a, u = acts.double(), units.double()
        self._n += len(a)
        terms = (a.sum(0), a.square().sum(0), u.sum(0), u.square().sum(0))
        self._sums = [known + term for known, term in zip(self._sums, terms, strict=True)]
        self._cross += a.T @ u

    def compute(self) -> Float[Tensor, " d_sae"]:
        """The largest for each latent; nan where the latent or all units are constant."""
        a, aa, u, uu = self._sums
        spread_a, spread_u = self._n * aa - a.square(), self._n * uu - u.square()
        spread = (spread_a.clamp_min(0)[:, None] * spread_u.clamp_min(0)[None, :]).sqrt()
        correlation = (self._n * self._cross - a[:, None] * u[None, :]) / spread
        found = correlation.abs().nan_to_num(nan=-1.0, posinf=-1.0).amax(dim=1)
        return torch.where(found >= 0, found, torch.nan).float()
