"""Bootstrap intervals of means over tokens, where the contexts are what is independent."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its 95 % bootstrap interval over contexts."""

    value: float
    """The figure over all contexts."""
    low: float
    """2.5 % quantile of the resamples."""
    high: float
    """97.5 % quantile of the resamples."""


class Resamples:
    """The same resamples of the contexts for every figure, so that differences are paired."""

    def __init__(self, n_contexts: int, n_resamples: int, seed: int) -> None:
        """Draw `n_resamples` times `n_contexts` contexts with replacement; row 0 has each once."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(n_contexts, (n_resamples, n_contexts), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        self._weights = torch.cat([torch.ones(1, n_contexts, dtype=torch.float64), counts])

    def mean(
        self, sums: Float64[Tensor, " example"], n_tokens: Float64[Tensor, " example"]
    ) -> Float64[Tensor, " batch"]:
        """Mean per token over all contexts, then over each resample.

        Args:
            sums: Sum over the tokens of each context.
            n_tokens: Tokens of each context.
        """
        return (self._weights @ sums) / (self._weights @ n_tokens)


def interval(values: Float[Tensor, " batch"]) -> Interval:
    """The first of the values with the quantiles of the others; nan where nothing is defined."""
    others = values[1:][values[1:].isfinite()]
    if len(others) == 0:
        return Interval(value=float(values[0]), low=math.nan, high=math.nan)
    low, high = torch.quantile(others, torch.tensor([0.025, 0.975], dtype=others.dtype)).tolist()
    return Interval(value=float(values[0]), low=low, high=high)
