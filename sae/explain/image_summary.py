"""The labels of a dictionary of images in a few figures, with what chance gives.

How well a label tells images that no label was made from is the area under the ROC curve of the
latent's peak: the probability that an image of the class has a larger one than another image, ties
counting half. Images are what is independent, so they are what the intervals rest on, and latents
of one dictionary share them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from scipy.stats import rankdata

from sae.explain.config import ExplainConfig, Method
from sae.explain.examples import Activity, ImagePart
from sae.explain.image_labels import ByClass, ByWords, ImageLabels
from sae.explain.results import LEVEL, LabelFigures, common_figures, share_of_live
from sae.explain.run import Explained
from sae.explain.scores import Mean, Scores
from sae.statistics import Interval, Z
from sae.statistics import auc as auc_with_interval

NO_MEAN = Mean(float("nan"), float("nan"), float("nan"))
"""Where there is nothing to take the mean of."""

_LATENTS_AT_ONCE = 1024


@dataclass(frozen=True)
class ImageScores(Scores):
    """Scores on the score split, with DeLong's interval."""

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
        return with_interval(float(np.nanmean(self.auc)), self.influence) if self._any else NO_MEAN

    def less(self, other: "ImageScores") -> Mean:
        """Its mean AUC less that of other labels on the same images; nan where either has none."""
        if not (self._any and other._any):
            return NO_MEAN
        difference = self.mean.mean - other.mean.mean
        return with_interval(difference, self.influence - other.influence)

    @property
    def _any(self) -> bool:
        return bool(np.isfinite(self.auc).any())


def with_interval(mean: float, influence: Float64[np.ndarray, " example"]) -> Mean:
    """A mean of AUCs, or a difference of two on the same images, by the influence of the images."""
    half = Z * float(influence.std(ddof=1)) / len(influence) ** 0.5
    return Mean(mean, mean - half, mean + half)


def held_out(
    peaks: Float32[np.ndarray, "example d_sae"],
    has: Bool[np.ndarray, "example word"],
    concept: Int64[np.ndarray, " d_sae"],
    permutations: int,
    generator: np.random.Generator,
) -> ImageScores:
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
    result = ImageScores(auc, low, high, p_value, np.zeros(n))
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
            _score(peaks[:, chunk], member, null, chunk, result)
    result.influence[:] /= max(n_scored, 1)
    return result


def aucs(
    peaks: Float32[np.ndarray, "example d_sae"], has: Bool[np.ndarray, "example word"]
) -> Float64[np.ndarray, "d_sae word"]:
    """AUC of every latent for every concept; nan where all images have it, or none."""
    n_has = has.sum(axis=0).astype(np.float64)
    n_other = len(has) - n_has
    result = np.empty((peaks.shape[1], has.shape[1]))
    for start in range(0, len(result), _LATENTS_AT_ONCE):
        part = slice(start, start + _LATENTS_AT_ONCE)
        result[part] = rankdata(peaks[:, part], axis=0).T @ has - n_has * (n_has + 1) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return result / (n_has * n_other)


def _score(
    peaks: np.ndarray,
    member: np.ndarray,
    null: np.ndarray,
    latents: np.ndarray,
    result: ImageScores,
) -> None:
    """Score latents of one concept, into their places."""
    n, n_has = len(member), int(member.sum())
    n_other = n - n_has
    ranks = rankdata(peaks, axis=0)
    above = (ranks[member] - rankdata(peaks[member], axis=0)) / n_other
    below = 1 - (ranks[~member] - rankdata(peaks[~member], axis=0)) / n_has
    auc = above.mean(axis=0)
    result.auc[latents] = auc
    result.influence[member] += ((above - auc) * (n / n_has)).sum(axis=1)
    result.influence[~member] += ((below - auc) * (n / n_other)).sum(axis=1)
    # In float32 from ranks around their middle, so that equal AUCs stay within the tolerance.
    sums = (ranks - (n + 1) / 2).astype(np.float32).T @ null
    rank_sum = (ranks[member] - (n + 1) / 2).sum(axis=0)
    as_large = (sums >= (rank_sum - 1e-3 * n)[:, None]).sum(axis=1)
    result.p_value[latents] = (1 + as_large) / (1 + null.shape[1])
    for column, latent in enumerate(latents):
        values = peaks[:, column].astype(np.float64)
        ends = auc_with_interval(values[member], values[~member])
        result.low[latent], result.high[latent] = ends.low, ends.high


N_STRONGEST = 5
"""So many images of the score split are a latent's strongest."""

_RESAMPLES = 200


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
        return Strongest(NO_MEAN, np.zeros(0))
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(peaks), np.full(len(peaks), 1 / len(peaks)), _RESAMPLES)
    order = np.argsort(-peaks[:, latents], axis=0, kind="stable")[: 8 * N_STRONGEST]
    fires = np.take_along_axis(peaks[:, latents], order, axis=0) > 0
    right = has[order, concept[latents]]
    rates = [_lift(weight, order, fires, right, has, concept[latents]) for weight in counts]
    value = _lift(np.ones_like(counts[0]), order, fires, right, has, concept[latents])
    half = Z * float(np.std(rates, ddof=1))
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
    fired_weight = weight[order] * fires
    taken = np.clip(N_STRONGEST - (np.cumsum(fired_weight, axis=0) - fired_weight), 0, fired_weight)
    share = (taken * right).sum(axis=0) / np.maximum(taken.sum(axis=0), 1)
    return float((share - (weight @ has / weight.sum())[concept]).mean())


@dataclass(frozen=True, kw_only=True)
class ImageSummary(LabelFigures):
    """Shares are of all live latents; those without a label or a score count as not beating."""

    n_unlabelled: int
    """Latents that fire often enough, and no class is certain."""
    over_exchanged: Mean
    """Mean AUC of the labels less that of other latents' labels, on the same images."""
    by_folders: Mean
    """Mean AUC of the labels that name a folder, by what lies there; nan for labels of folders."""
    by_folders_over_exchanged: Mean
    """The same less that of other latents' labels."""
    strongest: Mean
    """Mean over the scored latents of the share of their 5 strongest images that have the label,
    less the label's share of all images; its interval is over images."""
    beats_null: Interval
    """Share whose AUC beats the permuted classes at 1 %; Wilson's interval over latents."""
    beats_null_shuffled: Interval
    """The same when the classes are exchanged between images before labelling: 1 % or less."""
    by_method: Mapping[Method, Mapping[str, float]]
    """Mean AUC, share that beats the null and number scored of either labelling method."""
    best_of_class: Mean
    """Mean over classes, or words that are labels, of the AUC of each one's best latent, chosen on
    the explain split."""
    n_images_explain: int
    """Images from which labels were made."""
    n_images_score: int
    """Images on which they were scored."""
    strongest_resampled: tuple[float, ...]
    """The same over resampled images, for differences between dictionaries."""
    influence: tuple[float, ...]
    """Of each image of the score split on the mean AUC, for differences between dictionaries."""


@dataclass(frozen=True, kw_only=True)
class ExplainedImages(Explained):
    """The labels of a dictionary that reads images."""

    labels: ImageLabels
    """Of the explain split."""
    scores: ImageScores
    control: ImageScores
    summary: ImageSummary
    baselines: Mapping[str, ImageSummary] = field(default_factory=dict)

    @property
    def words(self) -> Mapping[str, Any]:
        """What is recorded of the towers or captions, where labels are words; else empty."""
        return self.more.get("words", {})


class ImageLabelScorer:
    """Labels made from one split and scored on another.

    Args:
        parts: The explain and the score split.
        said: What labels may say, and which images have it.
        config: How; of it `images` and the seed of the permutations and of the exchange.
    """

    def __init__(
        self, parts: Sequence[ImagePart], said: ByClass | ByWords, config: ExplainConfig
    ) -> None:
        self._parts, self._said, self._config = parts, said, config
        self._peaks = [part.peaks for part in parts]
        self._generator = np.random.default_rng(config.seed)
        fired = np.stack([(peaks > 0).sum(axis=0) for peaks in self._peaks])
        self._enough = (fired >= config.images.min_images).all(axis=0)
        self._live = fired.any(axis=0)

    def explained(self, active: Activity, more: Mapping[str, Any]) -> ExplainedImages:
        """Label and score, and do the same with other latents' labels and exchanged images.

        Args:
            active: How often and how strongly the latents fire.
            more: What the result has beside the figures.
        """
        said, method = self._said, self._said.method
        labels, has = said.labels(self._peaks[0]), said.has[1]
        judged: dict[Method, ImageScores] = {
            m: self._held_out(has, of_one) for m, of_one in labels.concept.items()
        }
        verdicts, concept = judged[method], labels.concept[method]
        is_scored = np.isfinite(verdicts.auc)
        void = said.exchanged(self._generator)
        control = self._held_out(has, _exchanged(concept, is_scored))
        of_void = self._held_out(void.has[1], void.labels(self._peaks[0]).concept[method])
        status = np.where(self._enough, "unlabelled", "insufficient")
        status = np.where(self._live, np.where(is_scored, "scored", status), "dead")
        labelled = np.where(is_scored, concept, -1)
        top = strongest(self._peaks[1], has, labelled, self._config.seed)
        return ExplainedImages(
            labels=labels,
            scores=verdicts,
            control=control,
            status=tuple(status.tolist()),
            activity=active,
            summary=self._summary(status, labelled, judged, control, of_void, top),
            more=more,
        )

    def _held_out(
        self, has: Bool[np.ndarray, "example word"], concept: Int64[np.ndarray, " d_sae"]
    ) -> ImageScores:
        wanted = np.where(self._enough, concept, -1)
        n = self._config.images.permutations
        return held_out(self._peaks[1], has, wanted, n, self._generator)

    def _summary(
        self,
        status: np.ndarray,
        labelled: Int64[np.ndarray, " d_sae"],
        judged: Mapping[Method, ImageScores],
        control: ImageScores,
        of_void: ImageScores,
        top: Strongest,
    ) -> ImageSummary:
        verdicts = judged[self._said.method]
        best = self._best_of_class(labelled)
        by_folders, over_exchanged = self._by_folders(labelled)
        return ImageSummary(
            **common_figures(status, verdicts.auc, self._parts),
            n_unlabelled=int(np.count_nonzero(status == "unlabelled")),
            auc=verdicts.mean,
            control_auc=control.mean,
            over_exchanged=verdicts.less(control),
            by_folders=by_folders,
            by_folders_over_exchanged=over_exchanged,
            strongest=top.mean,
            beats_null=share_of_live(verdicts.beats(LEVEL), status),
            beats_null_shuffled=share_of_live(of_void.beats(LEVEL), status),
            by_method={method: _figures(result, status) for method, result in judged.items()},
            best_of_class=best,
            n_images_explain=len(self._peaks[0]),
            n_images_score=len(self._peaks[1]),
            strongest_resampled=tuple(top.resampled.tolist()),
            influence=tuple(verdicts.influence.tolist()),
        )

    def _by_folders(self, labelled: Int64[np.ndarray, " d_sae"]) -> tuple[Mean, Mean]:
        """How well words that name a folder tell it, and by how much better than exchanged ones."""
        folders = self._said.folders
        if folders is None:
            return NO_MEAN, NO_MEAN
        is_named = (labelled >= 0) & (folders.sum(axis=0)[labelled] > 0)
        named = np.where(is_named, labelled, -1)
        result = self._held_out(folders, named)
        is_scored = np.isfinite(result.auc)
        other = self._held_out(folders, _exchanged(named, is_scored))
        return result.mean, result.less(other)

    def _best_of_class(self, labelled: Int64[np.ndarray, " d_sae"]) -> Mean:
        """How well one latent per concept, chosen on the explain split, tells that concept."""
        which = self._said.each_to_tell(labelled)
        has = [of_split[:, which] for of_split in self._said.has]
        first = aucs(self._peaks[0], has[0])
        best = np.nan_to_num(first, nan=-1.0).argmax(axis=0)
        every = np.arange(len(which))
        return held_out(self._peaks[1][:, best], has[1], every, 1, self._generator).mean


def _exchanged(
    concept: Int64[np.ndarray, " d_sae"], is_scored: Bool[np.ndarray, " d_sae"]
) -> Int64[np.ndarray, " d_sae"]:
    """The label of the next latent that has one."""
    result = np.full_like(concept, -1)
    result[is_scored] = np.roll(concept[is_scored], 1)
    return result


def _figures(result: ImageScores, status: np.ndarray) -> dict[str, float]:
    share = share_of_live(result.beats(LEVEL), status).value
    n_scored = float(np.isfinite(result.auc).sum())
    return {"auc": result.mean.mean, "beats_null": share, "n_scored": n_scored}
