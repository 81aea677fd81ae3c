"""Logistic probes, one per feature: what reading a world linearly, knowing the truth, can reach."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.evaluate.ground_truth.assignment import Pairs
from sae.evaluate.ground_truth.generator import DenseRows, Split, rows
from sae.evaluate.ground_truth.scores import FiringCounts, FiringScores
from sae.evaluate.ground_truth.world import World

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
