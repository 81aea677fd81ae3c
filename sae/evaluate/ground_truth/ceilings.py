"""What limits a score beside the dictionary: reading linearly, and k itself."""

from dataclasses import dataclass

import torch

from sae.autoencoder import SparseAutoencoder
from sae.evaluate.ground_truth.config import GroundTruthConfig
from sae.evaluate.ground_truth.generator import rows
from sae.evaluate.ground_truth.probe import probe_scores
from sae.evaluate.ground_truth.scores import FiringScores
from sae.evaluate.ground_truth.world import World, make_world
from sae.metrics import FVU

ROWS_AT_ONCE = 4096
"""Rows that are made together."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Scores of readers that know the truth."""

    probe: FiringScores
    """Of one logistic probe per feature, on rows that it was not fitted to."""
    oracle_fvu: float
    """FVU of the k largest true activations of each row with the true directions.

    A dictionary below it explains variance by what is not one feature: rows in which more than k
    features fire reward latents that stand for several.
    """


@torch.no_grad()
def measure_ceilings(
    config: GroundTruthConfig,
    seed: int,
    *,
    k: int,
    n_features: int | None = None,
    device: torch.device | str = "cpu",
) -> Ceilings:
    """Ceilings of a world over config.n_rows rows (and as many to fit the probes).

    Args:
        config: The world.
        seed: The world.
        k: Activations that the oracle may keep in a row.
        n_features: Features that are probed and kept, the most frequent ones; all when absent.
        device: Where to compute.
    """
    world = make_world(config, seed, device=device)
    n = min(n_features or world.n_features, world.n_features)
    return Ceilings(probe=probe_scores(world, n), oracle_fvu=oracle_fvu(world, k, n))


@torch.no_grad()
def set_true_decoder(dictionary: SparseAutoencoder, world: World) -> None:
    """Fill a dictionary, in place, with the true directions, the most frequent features first.

    The encoder begins as their transpose. Trained with `frozen: decoder` it gives the true-decoder
    ceiling: what is then still wrong is the encoder's part.

    Raises:
        ValueError: If the dictionary has more latents than the world has features.
    """
    d_sae = dictionary.config.d_sae
    if d_sae > world.n_features:
        raise ValueError(
            f"d_sae must be at most n_features={world.n_features} for a true decoder, got {d_sae}"
        )
    dictionary.dec_rows.copy_(world.directions[:d_sae])
    dictionary.enc_rows.copy_(world.directions[:d_sae])
    dictionary.b_enc.zero_()
    dictionary.b_dec.copy_(world.bias * dictionary.config.input_scale)


@torch.no_grad()
def oracle_fvu(world: World, k: int, n_features: int) -> float:
    """FVU of the k largest true activations among the first n_features, with true directions."""
    metric = FVU()
    for first in range(0, world.config.n_rows, ROWS_AT_ONCE):
        x, acts = rows(world, first, min(first + ROWS_AT_ONCE, world.config.n_rows), split="score")
        top = acts[:, :n_features].topk(min(k, n_features), dim=1)
        kept = torch.zeros_like(acts).scatter_(1, top.indices, top.values)
        metric.update(x, kept @ world.directions + world.bias)
    return metric.compute()
