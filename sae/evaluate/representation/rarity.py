"""ZEBRA: which features of a sample are rare, so that an outlier is explained by them."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor


class Rarity(NamedTuple):
    """How rare the features of samples are among reference rows."""

    p: Float64[Tensor, "row d_sae"]
    """Tail probability of each activation: uniform for a sample like the reference rows."""
    score: Float64[Tensor, " row"]
    """Weighted mean of -log p over the features: 1 on average for such a sample."""

    def explanation(self, sample: int, k: int) -> Tensor:
        """Numbers of the k rarest features of a sample, the rarest first."""
        return self.p[sample].argsort()[:k]


def rarity(
    reference: Float[Tensor, "other _"],
    samples: Float[Tensor, "row d_sae"],
    generator: torch.Generator,
    weights: Float[Tensor, " d_sae"] | None = None,
) -> Rarity:
    """Share of the reference rows at or above each activation, ties broken at random.

    p = (n_above + u (n_equal + 1)) / (n + 1), u uniform, which is uniform itself where the sample
    comes from the reference; without the ties' part the zeros of a sparse feature would not be.

    Args:
        reference: Activations that are ordinary.
        samples: Activations of what is to be explained.
        generator: Breaks the ties.
        weights: How much each feature counts in the score; all the same without.

    Raises:
        ValueError: If widths differ, there is no reference row, or the weights sum to 0.
    """
    if len(reference) == 0 or reference.shape[1] != samples.shape[1]:
        raise ValueError(
            "reference must have rows as wide as the samples, got "
            f"{tuple(reference.shape)} and {tuple(samples.shape)}"
        )
    n = len(reference)
    columns = reference.detach().double().sort(dim=0).values.T.contiguous()
    wanted = samples.detach().double().T.contiguous()
    below = torch.searchsorted(columns, wanted).T
    up_to = torch.searchsorted(columns, wanted, right=True).T
    u = torch.rand(below.shape, generator=generator, dtype=torch.float64)
    p = ((n - up_to) + u * (up_to - below + 1)) / (n + 1)
    share = torch.ones(p.shape[1]) if weights is None else weights.detach()
    if not float(share.sum()) > 0 or bool((share < 0).any()):
        raise ValueError(f"weights must be at least 0 and not all 0, got sum {float(share.sum())}")
    share = share.double() / share.double().sum()
    return Rarity(p, -p.clamp_min(torch.finfo(p.dtype).tiny).log() @ share)
