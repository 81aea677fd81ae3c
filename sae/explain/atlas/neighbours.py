"""Neighbours by decoder cosine, inside a dictionary and across widths; feature splitting.

Latents that fire together: the correlation of firing over rows.

Find latents by contrasting prompts, and compare latents with units of the model.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from activations_cache.checks import Progress, silent
from sae.explain.firings import Codes

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


def chance_cosine(
    dec_rows: Float[Tensor, "d_sae d_out"], *, n_random: int = 1000, seed: int = 0
) -> float:
    """Below it lie 95 % of the cosines of random directions with their nearest latent.

    NumPy draws them: torch with the seed of a dictionary would draw its initial decoder again.
    """
    drawn = np.random.default_rng(seed).standard_normal((n_random, dec_rows.shape[1]))
    random = torch.from_numpy(drawn).to(dec_rows)
    return float(nearest(random, dec_rows, 1).cosine.quantile(0.95))


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


_LATENTS_AT_ONCE = 512


class Together(NamedTuple):
    """A latent that fires where another one fires."""

    latent: int
    """Its number."""
    correlation: float
    """Phi: the Pearson correlation of firing, 1 or 0, over rows; chance gives 0 at any density."""
    n_rows: int
    """Rows on which both fire."""


def cofiring(
    codes: Codes, k: int, *, least: int = 5, progress: Progress | None = None
) -> list[tuple[Together, ...]]:
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
    found: list[tuple[Together, ...]] = []
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
) -> tuple[Together, ...]:
    keep = (both >= least) & (others != latent)
    others, both = others[keep], both[keep].astype(np.float64)
    n, own, theirs = codes.n_rows, float(codes.n_fired[latent]), codes.n_fired[others]
    spread = own * (n - own) * theirs * (n - theirs)
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = np.where(spread > 0, (n * both - own * theirs) / np.sqrt(spread), 0.0)
    order = np.lexsort((others, -phi))[:k]
    order = order[phi[order] > 0]
    return tuple(Together(int(others[i]), float(phi[i]), int(both[i])) for i in order)


CAUTION = (
    "That a latent exists which fires on such texts says nothing about what the model does, knows "
    "or intends: with enough latents some fire on anything."
)
"""To be shown beside every result of a search for safety-relevant latents."""

SAFETY = {
    "unsafe code": "bugs, back doors and exploits in program text",
    "bias": "slurs, stereotypes and claims about groups of people",
    "sycophancy": "praise and agreement that nobody asked for",
    "deception and power": "lying, hiding, manipulating, taking control",
    "criminal content": "weapons, drugs, scams and how they are made",
    "self-representation": "the model as an assistant, a robot, a mind",
}
"""The families of Scaling Monosemanticity, to write positive and control prompts for."""


class Contrast(NamedTuple):
    """Latents ranked by how well they tell the positives from the negatives."""

    latent: Int[Tensor, " k"]
    """Best first."""
    score: Float[Tensor, " k"]
    """Least activation over the positives minus the largest over the negatives, in shares of the
    latent's maximum; above 0: on all positives more than on any negative."""


def contrast(
    positive: Float[Tensor, "batch d_sae"],
    negative: Float[Tensor, "row d_sae"],
    max_activation: Float[Tensor, " d_sae"],
    k: int = 20,
) -> Contrast:
    """Latents that are active on all positive prompts and on no negative one.

    Args:
        positive: Largest activation of each latent on each positive prompt.
        negative: The same for the negative ones; a property of both is not found.
        max_activation: Over a corpus, so that latents of all sizes compete; 0 for dead ones.
        k: How many.

    Raises:
        ValueError: If there is no positive prompt.
    """
    if not len(positive):
        raise ValueError("positive must have prompts, got none")
    highest = negative.amax(dim=0) if len(negative) else torch.zeros_like(max_activation)
    score = (positive.amin(dim=0) - highest) / max_activation.clamp_min(1e-12)
    score = torch.where(max_activation > 0, score, -torch.inf)
    top = score.topk(min(k, len(score)))
    return Contrast(top.indices, top.values)


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
