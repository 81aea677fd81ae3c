"""The labels of a dictionary of images in a few figures, with what chance gives."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from sae.explain.config import ImageLabelConfig, Method
from sae.explain.scores import FLOOR, Mean
from sae.explain.vision.concepts import Concepts
from sae.explain.vision.firing import Seen
from sae.explain.vision.held_out import HeldOut, Strongest, aucs, held_out, strongest
from sae.explain.vision.labelling import ImageLabels, make_labels
from sae.statistics import Interval, wilson

LEVEL = 0.01
"""At which a label's AUC beats the permuted classes."""

STATUSES = ("scored", "unlabelled", "insufficient", "dead")


@dataclass(frozen=True)
class ImageSummary:
    """Shares are of all live latents; those without a label or a score count as not beating."""

    n_latents: int
    """All latents."""
    n_scored: int
    """Latents with a label that was scored."""
    n_unlabelled: int
    """Latents that fire often enough, and no class is certain."""
    n_insufficient: int
    """Live latents that fire on too few images of either split."""
    n_dead: int
    """Latents that fire on no image of the two splits."""
    auc: Mean
    """Mean AUC of the labels over the scored latents; its interval is over images."""
    auc_median: float
    """Median AUC over the scored latents."""
    auc_all_live: float
    """Mean AUC over the live latents, the others counted at the floor."""
    control_auc: Mean
    """Mean AUC of other latents' labels."""
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
    """Mean over classes of the AUC of each class's best latent, chosen on the explain split."""
    floor: float
    """The AUC of knowing nothing."""
    n_images_explain: int
    """Images from which labels were made."""
    n_images_score: int
    """Images on which they were scored."""
    strongest_resampled: tuple[float, ...]
    """The same over resampled images, for differences between dictionaries."""
    influence: tuple[float, ...]
    """Of each image of the score split on the mean AUC, for differences between dictionaries."""


@dataclass(frozen=True)
class Scored:
    """Labels and what the other images say of them."""

    labels: ImageLabels
    """Of the explain split."""
    scores: HeldOut
    """Of the labels."""
    control: HeldOut
    """Of other latents' labels."""
    status: tuple[str, ...]
    """"scored", "unlabelled", "insufficient" or "dead" for each latent."""
    summary: ImageSummary
    """All of it in a few figures."""


class Judge:
    """Labels made from one split and scored on another.

    Args:
        made_from: The explain split.
        scored_on: The score split.
        concepts: What labels may say.
        config: How.
        seed: Of the permutations and of the exchange.
    """

    def __init__(
        self,
        made_from: Seen,
        scored_on: Seen,
        concepts: Concepts,
        config: ImageLabelConfig,
        seed: int,
    ) -> None:
        self._parts, self._concepts, self._config = (made_from, scored_on), concepts, config
        self._seed, self._generator = seed, np.random.default_rng(seed)
        fired = np.stack([(part.peaks > 0).sum(axis=0) for part in self._parts])
        self._enough = (fired >= config.min_images).all(axis=0)
        self._live = fired.any(axis=0)

    def scored(self) -> Scored:
        """Label and score, and do the same with other latents' labels and exchanged classes."""
        method = self._config.method
        has = [self._concepts.has(part.classes) for part in self._parts]
        labels = self._labels(has[0])
        judged: dict[Method, HeldOut] = {
            m: self._held_out(has[1], of_one) for m, of_one in labels.concept.items()
        }
        own, concept = judged[method], labels.concept[method]
        is_scored = np.isfinite(own.auc)
        exchanged = np.full_like(concept, -1)
        exchanged[is_scored] = np.roll(concept[is_scored], 1)
        void = [self._generator.permutation(of_one) for of_one in has]
        control = self._held_out(has[1], exchanged)
        of_void = self._held_out(void[1], self._labels(void[0]).concept[method])
        status = np.where(self._enough, "unlabelled", "insufficient")
        status = np.where(self._live, np.where(is_scored, "scored", status), "dead")
        top = strongest(self._parts[1].peaks, has[1], np.where(is_scored, concept, -1), self._seed)
        summary = self._summary(status, judged, control, of_void, top)
        return Scored(labels, own, control, tuple(status.tolist()), summary)

    def _labels(self, has: Bool[np.ndarray, "example word"]) -> ImageLabels:
        return make_labels(self._parts[0].peaks, has, self._concepts.n_classes, self._config)

    def _held_out(
        self, has: Bool[np.ndarray, "example word"], concept: Int64[np.ndarray, " d_sae"]
    ) -> HeldOut:
        wanted = np.where(self._enough, concept, -1)
        n = self._config.permutations
        return held_out(self._parts[1].peaks, has, wanted, n, self._generator)

    def _summary(
        self,
        status: np.ndarray,
        judged: Mapping[Method, HeldOut],
        control: HeldOut,
        of_void: HeldOut,
        top: Strongest,
    ) -> ImageSummary:
        own, n_live = judged[self._config.method], int(np.count_nonzero(self._live))
        counts = {name: int(np.count_nonzero(status == name)) for name in STATUSES}
        n_scored = counts["scored"]
        return ImageSummary(
            n_latents=len(status),
            n_scored=n_scored,
            n_unlabelled=counts["unlabelled"],
            n_insufficient=counts["insufficient"],
            n_dead=counts["dead"],
            auc=own.mean,
            auc_median=float(np.nanmedian(own.auc)) if n_scored else float("nan"),
            auc_all_live=_all_live(own, n_live),
            control_auc=control.mean,
            strongest=top.mean,
            beats_null=_share(own.beats(LEVEL), n_live),
            beats_null_shuffled=_share(of_void.beats(LEVEL), n_live),
            by_method={method: _figures(found, n_live) for method, found in judged.items()},
            best_of_class=self._best_of_class(),
            floor=FLOOR,
            n_images_explain=len(self._parts[0].classes),
            n_images_score=len(self._parts[1].classes),
            strongest_resampled=tuple(top.resampled.tolist()),
            influence=tuple(own.influence.tolist()),
        )

    def _best_of_class(self) -> Mean:
        """How well one latent per class, chosen on the explain split, tells that class."""
        own = np.arange(self._concepts.n_classes)
        has = [self._concepts.has(part.classes)[:, own] for part in self._parts]
        first = aucs(self._parts[0].peaks, has[0])
        best = np.nan_to_num(first, nan=-1.0).argmax(axis=0)
        return held_out(self._parts[1].peaks[:, best], has[1], own, 1, self._generator).mean


def _share(holds: Bool[np.ndarray, " d_sae"], n_live: int) -> Interval:
    return wilson(int(holds.sum()), n_live) if n_live else Interval(*[float("nan")] * 3)


def _all_live(found: HeldOut, n_live: int) -> float:
    scored = found.auc[np.isfinite(found.auc)]
    return float(scored.sum() + FLOOR * (n_live - len(scored))) / n_live if n_live else float("nan")


def _figures(found: HeldOut, n_live: int) -> dict[str, float]:
    n = int(np.isfinite(found.auc).sum())
    share = _share(found.beats(LEVEL), n_live).value
    return {"auc": found.mean.mean, "beats_null": share, "n_scored": float(n)}
