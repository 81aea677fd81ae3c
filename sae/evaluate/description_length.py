"""Description length: how many bits a row's activations take, and what the rounding costs.

Meta-dictionaries: whether a dictionary's directions are sums of fewer directions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from activations_cache.checks import MonosemaError, Progress, silent
from sae.architecture import SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.metrics import FVU, fvu


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
        raise MonosemaError(f"step must be above 0 and x have rows, got {step} and {len(x)} rows")
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
    result = torch.zeros(len(ordered), dtype=torch.float64)
    for i, column in enumerate(ordered):
        share = torch.unique_consecutive(column, return_counts=True)[1].double() / n
        result[i] = -(share * share.log2()).sum()
    return result


BATCH = 256
"""Directions in a step."""


@dataclass(frozen=True, kw_only=True)
class MetaScore:
    """How much of the decoder's rows a small dictionary of them explains."""

    explained: float
    """1 - FVU of the unit decoder rows."""
    chance: float
    """The same of as many random unit directions, by a dictionary trained the same way."""


def meta_score(
    dec_rows: Float[Tensor, "d_sae d_model"],
    *,
    d_meta: int | None = None,
    k: int = 4,
    steps: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> MetaScore:
    """Train a dictionary of a dictionary (Leask et al. 2025, arXiv 2502.04878; SAEBench).

    A high share beside a low chance says that latents are composed of common parts.

    Args:
        dec_rows: Decoder rows; their norms do not matter.
        d_meta: Meta-latents; a quarter of d_sae when absent.
        k: Meta-latents in each direction.
        steps: Of Adam, for each of the two dictionaries.
        seed: Decides first weights, order and random directions.
        progress: Called with the unit "steps".

    Raises:
        ValueError: If there are too few directions for k meta-latents.
    """
    width = len(dec_rows) // 4 if d_meta is None else d_meta
    if not 1 <= k <= width:
        raise MonosemaError(f"k must be in 1..{width}, the number of meta-latents, got {k}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(dec_rows.shape, generator=generator)
    results = []
    for part, rows in enumerate((dec_rows.detach(), drawn)):
        unit = torch.nn.functional.normalize(rows.float().cpu())
        tell = _shifted(progress or silent, part * steps, 2 * steps)
        meta = train_meta(unit, SAEConfig(d_in=unit.shape[1], d_sae=width, activation=TopK(k=k)),
                          steps, generator, tell)  # fmt: skip
        with torch.no_grad():
            results.append(1 - fvu(unit, meta(unit)))
    return MetaScore(explained=results[0], chance=results[1])


def train_meta(
    rows: Float[Tensor, "d_sae d_model"],
    config: SAEConfig,
    steps: int,
    generator: torch.Generator,
    progress: Progress,
) -> SparseAutoencoder:
    """A small loop of its own, as evaluation does not know training: Adam, decaying to 0."""
    meta = SparseAutoencoder(config)
    initialise(meta, generator, mean=rows.mean(dim=0))
    adam = torch.optim.Adam(meta.parameters(), lr=3e-3)
    for step in range(steps):
        x = rows[torch.randint(len(rows), (min(BATCH, len(rows)),), generator=generator)]
        loss = (meta(x) - x).square().sum(dim=1).mean()
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = 3e-3 * min(1.0, 2 * (1 - step / steps))
        adam.step()
        progress(step + 1, steps, "steps")
    return meta.requires_grad_(False)


def _shifted(progress: Progress, done_before: int, total: int) -> Progress:
    return lambda done, _, unit: progress(done_before + done, total, unit)
