"""Find latents by contrasting prompts, and compare latents with units of the model."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
