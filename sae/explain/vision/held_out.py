"""How well labels of images tell, by a latent's peaks, images that no label was made from.

The score is the area under the ROC curve of the peak: the probability that an image of the class
has a larger one than another image, ties counting half. Images are what is independent, so they are
what the intervals rest on, and latents of one dictionary share them.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from scipy.stats import rankdata

from sae.explain.scores import Mean
from sae.statistics import auc as auc_with_interval

N_STRONGEST = 5
"""So many images of the score split are a latent's strongest."""

_LATENTS_AT_ONCE = 1024
_RESAMPLES = 200
_Z = 1.959964


class HeldOut(NamedTuple):
    """Scores on the score split; nan for latents without one."""

    auc: Float64[np.ndarray, " d_sae"]
    """Area under the ROC curve."""
    low: Float64[np.ndarray, " d_sae"]
    """Lower end of its 95 % interval (DeLong's variance)."""
    high: Float64[np.ndarray, " d_sae"]
    """Upper end."""
    p_value: Float64[np.ndarray, " d_sae"]
    """Share of the permuted classes, the true ones among them, with an AUC as large."""
    influence: Float64[np.ndarray, " example"]
    """What each image adds to the mean AUC, times the number of images: its mean is 0."""

    def beats(self, level: float) -> Bool[np.ndarray, " d_sae"]:
        """Which latents beat the null at a level; one without a score does not."""
        return np.nan_to_num(self.p_value, nan=1.0) <= level

    @property
    def mean(self) -> Mean:
        """Mean AUC, its interval over images; nan where no latent has a score."""
        return with_interval(float(np.nanmean(self.auc)), self.influence) if self._any else _NONE

    @property
    def _any(self) -> bool:
        return bool(np.isfinite(self.auc).any())


_NONE = Mean(float("nan"), float("nan"), float("nan"))


def with_interval(mean: float, influence: Float64[np.ndarray, " example"]) -> Mean:
    """A mean of AUCs, or a difference of two on the same images, by the influence of the images."""
    half = _Z * float(influence.std(ddof=1)) / len(influence) ** 0.5
    return Mean(mean, mean - half, mean + half)


def held_out(
    peaks: Float32[np.ndarray, "example d_sae"],
    has: Bool[np.ndarray, "example word"],
    concept: Int64[np.ndarray, " d_sae"],
    permutations: int,
    generator: np.random.Generator,
) -> HeldOut:
    """Score latent i on the concept that its label names.

    Args:
        peaks: Of every image.
        has: Which concepts every image has.
        concept: What each latent's label names; -1: none.
        permutations: Copies of `has` with the images exchanged, the same ones for all latents.
        generator: Draws them.
    """
    n = len(peaks)
    orders = generator.permuted(np.tile(np.arange(n), (permutations, 1)), axis=1)
    auc, low, high, p_value = np.full((4, peaks.shape[1]), np.nan)
    found = HeldOut(auc, low, high, p_value, np.zeros(n))
    n_scored = 0
    for which in np.unique(concept[concept >= 0]):
        member = has[:, which]
        if not 0 < member.sum() < n:
            continue
        null = member[orders].T.astype(np.float32)  # (image, permutation)
        latents = np.flatnonzero(concept == which)
        n_scored += len(latents)
        for start in range(0, len(latents), _LATENTS_AT_ONCE):
            chunk = latents[start : start + _LATENTS_AT_ONCE]
            _score(peaks[:, chunk], member, null, chunk, found)
    found.influence[:] /= max(n_scored, 1)
    return found


def aucs(
    peaks: Float32[np.ndarray, "example d_sae"], has: Bool[np.ndarray, "example word"]
) -> Float64[np.ndarray, "d_sae word"]:
    """AUC of every latent for every concept; nan where all images have it, or none."""
    n_has = has.sum(axis=0).astype(np.float64)
    n_other = len(has) - n_has
    found = np.empty((peaks.shape[1], has.shape[1]))
    for start in range(0, len(found), _LATENTS_AT_ONCE):
        part = slice(start, start + _LATENTS_AT_ONCE)
        found[part] = rankdata(peaks[:, part], axis=0).T @ has - n_has * (n_has + 1) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return found / (n_has * n_other)


class Strongest(NamedTuple):
    """How often the images on which latents fire most have their labels, beyond chance."""

    mean: Mean
    """Mean over the latents; its interval is a bootstrap over images."""
    resampled: Float64[np.ndarray, " resample"]
    """The means of the resamples, which are the same images for every dictionary; empty where no
    latent has a label."""


def strongest(
    peaks: Float32[np.ndarray, "example d_sae"],
    has: Bool[np.ndarray, "example word"],
    concept: Int64[np.ndarray, " d_sae"],
    seed: int,
) -> Strongest:
    """Share of a latent's `N_STRONGEST` strongest images that its label names, less that of all.

    Args:
        peaks: Of every image.
        has: Which concepts every image has.
        concept: What each latent's label names; -1: none.
        seed: Of the resamples.
    """
    latents = np.flatnonzero(concept >= 0)
    if not len(latents):
        return Strongest(_NONE, np.zeros(0))
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(peaks), np.full(len(peaks), 1 / len(peaks)), _RESAMPLES)
    order = np.argsort(-peaks[:, latents], axis=0, kind="stable")[: 8 * N_STRONGEST]
    fires = np.take_along_axis(peaks[:, latents], order, axis=0) > 0
    right = has[order, concept[latents]]
    rates = [_lift(weight, order, fires, right, has, concept[latents]) for weight in counts]
    value = _lift(np.ones_like(counts[0]), order, fires, right, has, concept[latents])
    half = _Z * float(np.std(rates, ddof=1))
    return Strongest(Mean(value, value - half, value + half), np.array(rates))


def _lift(
    weight: np.ndarray,
    order: np.ndarray,
    fires: np.ndarray,
    right: np.ndarray,
    has: np.ndarray,
    concept: np.ndarray,
) -> float:
    """The mean over latents, where image i stands `weight[i]` times."""
    own = weight[order] * fires
    taken = np.clip(N_STRONGEST - (np.cumsum(own, axis=0) - own), 0, own)
    share = (taken * right).sum(axis=0) / np.maximum(taken.sum(axis=0), 1)
    return float((share - (weight @ has / weight.sum())[concept]).mean())


def _score(
    peaks: np.ndarray, member: np.ndarray, null: np.ndarray, latents: np.ndarray, found: HeldOut
) -> None:
    """Score latents of one concept, into their places."""
    n, n_has = len(member), int(member.sum())
    n_other = n - n_has
    ranks = rankdata(peaks, axis=0)
    above = (ranks[member] - rankdata(peaks[member], axis=0)) / n_other
    below = 1 - (ranks[~member] - rankdata(peaks[~member], axis=0)) / n_has
    auc = above.mean(axis=0)
    found.auc[latents] = auc
    found.influence[member] += ((above - auc) * (n / n_has)).sum(axis=1)
    found.influence[~member] += ((below - auc) * (n / n_other)).sum(axis=1)
    # In float32 from ranks around their middle, so that equal AUCs stay within the tolerance.
    sums = (ranks - (n + 1) / 2).astype(np.float32).T @ null
    own = (ranks[member] - (n + 1) / 2).sum(axis=0)
    as_large = (sums >= (own - 1e-3 * n)[:, None]).sum(axis=1)
    found.p_value[latents] = (1 + as_large) / (1 + null.shape[1])
    for column, latent in enumerate(latents):
        values = peaks[:, column].astype(np.float64)
        ends = auc_with_interval(values[member], values[~member])
        found.low[latent], found.high[latent] = ends.low, ends.high
