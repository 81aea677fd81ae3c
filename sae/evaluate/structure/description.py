"""Description length: how many bits a row's activations take, and what the rounding costs."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.metrics import FVU


@dataclass(frozen=True, kw_only=True)
class DescriptionLength:
    """Bits per row of a code, at the fidelity that its rounding leaves."""

    step: float
    """What activations were rounded to multiples of."""
    bits: float
    """Entropy of the rounded activations, summed over latents as if they were independent."""
    fvu: float
    """Of what is decoded from the rounded activations."""


@torch.no_grad()
def description_length(
    dictionary: SparseAutoencoder, x: Float[Tensor, "row d_in"], step: float
) -> DescriptionLength:
    """Entropy of the latents' rounded activations (Ayonrinde et al. 2024, arXiv 2410.11179).

    Compare dictionaries at equal FVU: a coarser step always takes fewer bits. The entropies are
    those of the sample, which are too low where latents fire in few rows.

    Raises:
        ValueError: If step is not above 0 or there is no row.
    """
    if step <= 0 or len(x) == 0:
        raise ValueError(f"step must be above 0 and x have rows, got {step} and {len(x)} rows")
    acts = dictionary.encode_dense(x)
    level = (acts / step).round()
    fvu = FVU()
    fvu.update(x, dictionary.decode(level * step, x))
    bits = float(entropies(level.long()).sum())
    return DescriptionLength(step=step, bits=bits, fvu=fvu.compute())


def entropies(level: Int64[Tensor, "row d_sae"]) -> Float64[Tensor, " d_sae"]:
    """Entropy of each column in bits."""
    ordered = level.sort(dim=0).values.T  # (d_sae, row)
    n = ordered.shape[1]
    found = torch.zeros(len(ordered), dtype=torch.float64)
    for i, column in enumerate(ordered):
        share = torch.unique_consecutive(column, return_counts=True)[1].double() / n
        found[i] = -(share * share.log2()).sum()
    return found
