"""Whether latents of two dictionaries fire together over shared rows, across layers or models."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.evaluate.representation.matching import Correlations, match


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Pearson correlations of activations."""

    forward: float
    """Mean over the first dictionary's latents of the largest correlation with the second's."""
    backward: float
    """The same from the second."""
    one_to_one: float
    """Mean over the best one-to-one assignment."""


@dataclass(frozen=True, kw_only=True)
class Universality:
    """How far two dictionaries' latents fire together, and what unpaired rows give."""

    n_rows: int
    """Rows that both read."""
    paired: Overlap
    """Over rows of the same examples and positions."""
    chance: Overlap
    """With the second side's rows moved on by one in each batch."""


@torch.no_grad()
def universality(
    a: SparseAutoencoder, b: SparseAutoencoder, batches: Iterable[tuple[Tensor, Tensor]]
) -> Universality:
    """Correlate the latents of dictionaries of any two streams.

    Memory is two (d_sae, d_sae) matrices of float64. Bricken et al. 2023 match so across seeds;
    silent latents count as 0.

    Args:
        a: The dictionary of the first stream.
        b: The dictionary of the second.
        batches: Pairs of rows (batch, d_in) of the same examples and positions, one per stream; in
            random order, so that neighbours are unrelated.

    Raises:
        ValueError: If a batch is not paired or there is none.
    """
    paired, moved = (Correlations(a.config.d_sae, b.config.d_sae) for _ in range(2))
    for x, y in batches:
        acts_a, acts_b = a.encode_dense(x), b.encode_dense(y)
        paired.update(acts_a, acts_b)
        moved.update(acts_a, acts_b.roll(1, dims=0))
    if paired.n_rows < 2:
        raise ValueError(f"batches must hold at least 2 rows, got {paired.n_rows}")
    return Universality(
        n_rows=paired.n_rows,
        paired=overlap(paired.compute()),
        chance=overlap(moved.compute()),
    )


def overlap(correlation: Float[Tensor, "d_sae other"]) -> Overlap:
    """The figures of a matrix of correlations."""
    return Overlap(
        forward=float(correlation.amax(dim=1).mean()),
        backward=float(correlation.amax(dim=0).mean()),
        one_to_one=float(match(correlation).values.mean()),
    )
