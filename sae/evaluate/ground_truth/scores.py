"""How well a dictionary's latents match a world's features, and what limits that score.

Latents are matched to features by the one-to-one assignment of largest total value. Two ceilings
stand next to the score: the dictionary's own form with the true directions at the same k, and
logistic probes, one per feature, that are trained with the truth.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from monosema.checks import MonosemaError, Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.ground_truth.world import DenseRows, Split, World, rows
from sae.metrics import FVU


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


class _Passed:
    """Tells how many batches of all passes were made: four over all rows, beside the fit's."""

    def __init__(self, world: World, progress: Progress = silent) -> None:
        self.done, self.progress = 0, progress
        self.total = 4 * _n_chunks(world) + _fit_steps(world)

    def __call__(self) -> None:
        self.done += 1
        self.progress(self.done, self.total, "batches")


def _n_chunks(world: World) -> int:
    return -(-world.config.n_rows // BATCH)


def _fit_steps(world: World) -> int:
    return max(LEAST_STEPS, _n_chunks(world))


def _probe_scores(world: World, n_features: int, passed: _Passed) -> FiringScores:
    """Scores of probes for the first n_features features, on rows that they were not fitted to.

    They are fitted to config.n_rows rows of the training stream; each then calls its feature firing
    from the probability that has the best F1 on these rows.
    """
    probes = _fitted(world, n_features, passed)
    threshold = _best_thresholds(world, probes, passed)
    same = torch.arange(n_features, device=threshold.device)
    counts = FiringCounts(Pairs(same, same))
    for x, acts in _chunks(world, "score", passed):
        counts.update(probes.read(x) >= threshold, acts[:, :n_features] > 0)
    return counts.compute()


def _chunks(world: World, split: Split, passed: _Passed) -> Iterator[DenseRows]:
    for first in range(0, world.config.n_rows, BATCH):
        end = min(first + BATCH, world.config.n_rows)
        yield rows(world, first, end, split=split)
        passed()


def _fitted(world: World, n_features: int, passed: _Passed) -> _Probes:
    probes = _untrained(world, n_features, passed)
    params = [probes.weights, probes.bias]
    adam = torch.optim.Adam(params, lr=LR, betas=(0.9, 0.99))
    n_chunks, steps = _n_chunks(world), _fit_steps(world)
    for step in range(steps):
        first = step % n_chunks * BATCH
        x, acts = rows(world, first, min(first + BATCH, world.config.n_rows))
        error = (probes.read(x) - (acts[:, :n_features] > 0).float()) / len(x)
        probes.weights.grad = ((x - probes.mean) @ probes.whiten).T @ error
        probes.bias.grad = error.sum(dim=0)
        adam.param_groups[0]["lr"] = LR * min(1.0, 2 * (1 - step / steps))
        adam.step()
        passed()
    return probes


def _untrained(world: World, n_features: int, passed: _Passed) -> _Probes:
    """Whiten the rows, so that Adam has the same way to go in every direction."""
    x = torch.cat([chunk.x for chunk in _chunks(world, "train", passed)]).double()
    mean = x.mean(dim=0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    whiten = vectors / (values.clamp_min(0) + 1e-6 * values[-1]).sqrt()
    weights = torch.zeros(len(mean), n_features, device=x.device)
    bias = torch.logit(world.rates[:n_features].clamp(1e-6, 1 - 1e-6))
    return _Probes(mean.float(), whiten.float(), weights, bias)


def _best_thresholds(world: World, probes: _Probes, passed: _Passed) -> Float[Tensor, " feature"]:
    """Per feature, of BINS thresholds the one of the largest F1 on the training rows."""
    shape = (BINS, len(probes.bias))
    called, hits = torch.zeros(2, *shape, dtype=torch.int64, device=probes.bias.device)
    for x, acts in _chunks(world, "train", passed):
        place = (probes.read(x) * BINS).long().clamp_max(BINS - 1)
        fires = (acts[:, : shape[1]] > 0).long()
        called.scatter_add_(0, place, torch.ones_like(place))
        hits.scatter_add_(0, place, fires)
    n_fired = hits.sum(dim=0)
    called, hits = (counts.flip(0).cumsum(dim=0).flip(0) for counts in (called, hits))
    return (hits / (called + n_fired).clamp_min(1)).argmax(dim=0) / BINS


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
    world: World, *, k: int, n_features: int | None = None, progress: Progress = silent
) -> Ceilings:
    """Ceilings of a world over config.n_rows rows (and as many to fit the probes).

    Args:
        world: Its config names the number of rows.
        k: Activations that the oracle may keep in a row.
        n_features: Features that are probed and kept, the most frequent ones; all when absent.
        progress: Called with the unit "batches", over all passes.
    """
    n = min(n_features or world.n_features, world.n_features)
    passed = _Passed(world, progress)
    probe = _probe_scores(world, n, passed)
    return Ceilings(probe=probe, oracle_fvu=_oracle_fvu(world, k, n, passed))


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
def _oracle_fvu(world: World, k: int, n_features: int, passed: _Passed) -> float:
    """FVU of the k largest true activations among the first n_features, with true directions."""
    metric = FVU()
    for x, acts in _chunks(world, "score", passed):
        top = acts[:, :n_features].topk(min(k, n_features), dim=1)
        largest = torch.zeros_like(acts).scatter_(1, top.indices, top.values)
        metric.update(x, largest @ world.directions + world.bias)
    return metric.compute()
