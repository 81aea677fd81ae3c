"""What limits a score beside the dictionary: reading linearly, and k itself.

Logistic probes, one per feature: what reading a world linearly, knowing the truth, can reach.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from monosema.checks import MonosemaError
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.ground_truth.config import GroundTruthConfig
from sae.evaluate.ground_truth.generator import DenseRows, Split, rows
from sae.evaluate.ground_truth.scores import FiringCounts, FiringScores, Pairs
from sae.evaluate.ground_truth.world import World, make_world
from sae.metrics import FVU

BATCH, LEAST_STEPS, LR = 2048, 100, 0.3
"""Adam on whitened rows has converged after about 100 steps; the rate falls over the last half."""

BINS = 100
"""Thresholds that are tried, from 0 to 1 in the probes' own probability."""


class _Probes(NamedTuple):
    """Probability of firing = sigmoid((x - mean) @ whiten @ weights + bias)."""

    mean: Float[Tensor, " d_model"]
    whiten: Float[Tensor, "d_model d_in"]
    weights: Float[Tensor, "d_in feature"]
    bias: Float[Tensor, " feature"]

    def read(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch feature"]:
        """Probabilities of firing."""
        z = (x - self.mean) @ self.whiten
        return torch.addmm(self.bias, z, self.weights).sigmoid()


@torch.no_grad()
def probe_scores(world: World, n_features: int) -> FiringScores:
    """Scores of probes for the first n_features features, on rows that they were not fitted to.

    They are fitted to config.n_rows rows of the training stream; each then calls its feature firing
    from the probability that has the best F1 on these rows.
    """
    probes = _fitted(world, n_features)
    threshold = _best_thresholds(world, probes)
    same = torch.arange(n_features, device=threshold.device)
    counts = FiringCounts(Pairs(same, same))
    for x, acts in _chunks(world, "score"):
        counts.update(probes.read(x) >= threshold, acts[:, :n_features] > 0)
    return counts.compute()


def _chunks(world: World, split: Split) -> Iterator[DenseRows]:
    for first in range(0, world.config.n_rows, BATCH):
        yield rows(world, first, min(first + BATCH, world.config.n_rows), split=split)


def _fitted(world: World, n_features: int) -> _Probes:
    probes = _untrained(world, n_features)
    params = [probes.weights, probes.bias]
    adam = torch.optim.Adam(params, lr=LR, betas=(0.9, 0.99))
    n_chunks = -(-world.config.n_rows // BATCH)
    steps = max(LEAST_STEPS, n_chunks)
    for step in range(steps):
        first = step % n_chunks * BATCH
        x, acts = rows(world, first, min(first + BATCH, world.config.n_rows))
        error = (probes.read(x) - (acts[:, :n_features] > 0).float()) / len(x)
        probes.weights.grad = ((x - probes.mean) @ probes.whiten).T @ error
        probes.bias.grad = error.sum(dim=0)
        adam.param_groups[0]["lr"] = LR * min(1.0, 2 * (1 - step / steps))
        adam.step()
    return probes


def _untrained(world: World, n_features: int) -> _Probes:
    """Whiten the rows, so that Adam has the same way to go in every direction."""
    x = torch.cat([chunk.x for chunk in _chunks(world, "train")]).double()
    mean = x.mean(dim=0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    whiten = vectors / (values.clamp_min(0) + 1e-6 * values[-1]).sqrt()
    weights = torch.zeros(len(mean), n_features, device=x.device)
    bias = torch.logit(world.rates[:n_features].clamp(1e-6, 1 - 1e-6))
    return _Probes(mean.float(), whiten.float(), weights, bias)


def _best_thresholds(world: World, probes: _Probes) -> Float[Tensor, " feature"]:
    """Per feature, of BINS thresholds the one of the largest F1 on the training rows."""
    shape = (BINS, len(probes.bias))
    called, hits = torch.zeros(2, *shape, dtype=torch.int64, device=probes.bias.device)
    for x, acts in _chunks(world, "train"):
        place = (probes.read(x) * BINS).long().clamp_max(BINS - 1)
        fires = (acts[:, : shape[1]] > 0).long()
        called.scatter_add_(0, place, torch.ones_like(place))
        hits.scatter_add_(0, place, fires)
    n_fired = hits.sum(dim=0)
    called, hits = (counts.flip(0).cumsum(dim=0).flip(0) for counts in (called, hits))
    return (hits / (called + n_fired).clamp_min(1)).argmax(dim=0) / BINS


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
        raise MonosemaError(
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
