"""How far a dictionary's latents are a world's features: directions, and when they fire.

The one-to-one assignment of largest total value, exactly.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor


class Pairs(NamedTuple):
    """Features and latents that are held against each other, one pair a place."""

    features: Int64[Tensor, " pair"]
    """Numbers of features."""
    latents: Int64[Tensor, " pair"]
    """Numbers of latents."""


def assign(values: Float[Tensor, "feature d_sae"]) -> Pairs:
    """Pairs that use each feature and each latent at most once, of the largest sum of values.

    There are min(n_features, d_sae) of them, in the order of the fewer (Crouse 2016, in scipy).
    """
    wide = values.shape[0] <= values.shape[1]
    rows, columns = linear_sum_assignment(
        (values if wide else values.T).double().cpu().numpy(), maximize=True
    )
    fewer = torch.as_tensor(rows, device=values.device)
    more = torch.as_tensor(columns, device=values.device)
    return Pairs(fewer, more) if wide else Pairs(more, fewer)


RECOVERED = 0.9
"""Cosine above which a feature counts as recovered."""


@dataclass(frozen=True, kw_only=True)
class DirectionScores:
    """What the decoder's directions say; a latent's norm, sign where noted, and number are free."""

    mcc: float
    """Mean |cosine| over the best one-to-one assignment of features and latents."""
    mmcs: float
    """Mean over features of the largest cosine with any latent (signed: -1 recovers nothing)."""
    recovered: float
    """Share of the features with a latent of cosine above RECOVERED."""
    uniqueness: float
    """Features that are some latent's nearest by |cosine|, over the latents (SynthSAEBench's)."""


@dataclass(frozen=True, kw_only=True)
class FiringScores:
    """How well latents tell, by firing (activation > 0), in which rows features fire."""

    f1: float
    """Mean over pairs of the harmonic mean of precision and recall."""
    precision: float
    """Mean over pairs of the share of the latent's rows in which the feature fires."""
    recall: float
    """Mean over pairs of the share of the feature's rows in which the latent fires."""


@torch.no_grad()
def cosines(
    directions: Float[Tensor, "feature d_model"], dec_rows: Float[Tensor, "d_sae d_model"]
) -> Float[Tensor, "feature d_sae"]:
    """Signed cosine of every feature with every latent; 0 for a latent without a direction."""
    norms = dec_rows.norm(dim=1, keepdim=True)
    unit = dec_rows / norms.clamp_min(torch.finfo(dec_rows.dtype).tiny)
    return directions @ unit.T


def matched(cosine: Float[Tensor, "feature d_sae"]) -> Pairs:
    """The one-to-one assignment of the largest sum of |cosine|."""
    return assign(cosine.abs())


def nearest(cosine: Float[Tensor, "feature d_sae"]) -> Pairs:
    """Each latent with the feature of the largest |cosine|; features may repeat."""
    latents = torch.arange(cosine.shape[1], device=cosine.device)
    return Pairs(cosine.abs().argmax(dim=0), latents)


def direction_scores(cosine: Float[Tensor, "feature d_sae"], pairs: Pairs) -> DirectionScores:
    """Scores from the cosines and their assignment (`matched`)."""
    best = cosine.amax(dim=1)
    return DirectionScores(
        mcc=float(cosine[pairs.features, pairs.latents].abs().mean()),
        mmcs=float(best.mean()),
        recovered=float((best > RECOVERED).float().mean()),
        uniqueness=len(nearest(cosine).features.unique()) / cosine.shape[1],
    )


class FiringCounts:
    """Counts, over batches, of rows in which the latent, the feature and both of a pair fire."""

    def __init__(self, pairs: Pairs) -> None:
        """Start with no rows."""
        self.pairs = pairs
        counts = torch.zeros(3, len(pairs.features), dtype=torch.int64)
        self.latent, self.feature, self.both = counts.to(pairs.features.device)

    def update(
        self, latents: Bool[Tensor, "batch d_sae"], features: Bool[Tensor, "batch feature"]
    ) -> None:
        """Add rows: where latents fire, and where features do."""
        of_latent, of_feature = latents[:, self.pairs.latents], features[:, self.pairs.features]
        self.latent += of_latent.sum(dim=0)
        self.feature += of_feature.sum(dim=0)
        self.both += (of_latent & of_feature).sum(dim=0)

    def compute(self) -> FiringScores:
        """Means over the pairs; what is undefined for a pair, because it never fires, counts 0."""
        both = self.both.double()
        f1 = 2 * both / (self.latent + self.feature).clamp_min(1)
        return FiringScores(
            f1=float(f1.mean()),
            precision=float((both / self.latent.clamp_min(1)).mean()),
            recall=float((both / self.feature.clamp_min(1)).mean()),
        )
