"""A class, a group of classes or a word for every latent, from the explain split alone, or none.

Enrichment with p-values says which classes or attributes a latent prefers; soft weighted PMI of
CLIP-Dissect (Oikarinen and Weng 2023, arXiv 2204.10965) compares concepts. Words come from a tower
for texts whose embeddings lie in one space with those of images.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64
from scipy import stats
from sklearn.linear_model import Lasso
from torch import Tensor

from monosema.checks import MonosemaError
from sae.explain.config import ImageLabelConfig, Method, WordsConfig

_WORDS_AT_ONCE = 2048
_LEAST_P = 1e-7
"""The published code adds it to each probability before the logarithm."""


class ConceptScores(NamedTuple):
    """How well concepts fit each latent."""

    score: Float[Tensor, "d_sae rank"]
    """Larger is better; comparable within a latent only."""
    concept: Int[Tensor, "d_sae rank"]
    """Which concepts these are: the best first, or all in their order."""
    best: Int[Tensor, " d_sae"]
    """The best concept; -1 where there are too few firing images to say."""
    abstains: Bool[Tensor, " d_sae"]
    """Latents that fire on fewer images than asked for."""


def soft_wpmi(
    activations: Float[Tensor, "example d_sae"],
    similarity: Float[Tensor, "row word"],
    *,
    top: int = 100,
    least: int = 5,
    temperature: float = 10.0,
    weight: float = 1.0,
    n_best: int | None = None,
) -> ConceptScores:
    """Score every concept for every latent, as the published code of CLIP-Dissect does.

    P = softmax over concepts of temperature x similarity; for the k = min(top, images that fire)
    strongest images of a latent, with p = 0.998 - 0.028 i / k for the image of rank i = 0, 1, ...:
    score = sum_x log(1 + p_x (P_xm - 1) + 1e-7) - weight x log mean over latents of exp(that sum).

    The published code always takes `top` images. A latent that fires on fewer would be described
    by images on which it is silent, so only those on which it fires are taken here, and latents
    that abstain are left out of the mean. Where each fires on `top` images the scores are equal.

    Args:
        activations: One figure per image and latent, such as the largest over patches.
        similarity: Cosine of each of the same images and concept; its dtype is computed in.
        top: Most images per latent.
        least: A latent with fewer firing images is not labelled.
        temperature: Sharpness of the softmax.
        weight: Lambda, how much a concept that fits all latents is held down.
        n_best: Concepts that are returned of each latent, the best first; all when absent.

    Raises:
        ValueError: If there is only one concept, or the images differ in number.
    """
    n_images, n_concepts = similarity.shape
    if n_concepts < 2:
        raise MonosemaError(f"concepts must be at least two to be told apart, got {n_concepts}")
    if len(activations) != n_images:
        raise MonosemaError(f"activations must be of {n_images} images, got {len(activations)}")
    probability = (temperature * similarity).softmax(dim=1)
    n_firing = (activations > 0).sum(dim=0)
    abstains = n_firing < least
    k = n_firing.clamp(max=min(top, n_images)).tolist()
    strongest = activations.topk(min(top, n_images), dim=0).indices  # (k, d_sae)
    kept: list[tuple[Tensor, Tensor]] = []
    for start in range(0, n_concepts, n_concepts if n_best is None else _WORDS_AT_ONCE):
        part = (
            probability[:, start:] if n_best is None else probability[:, start:][:, :_WORDS_AT_ONCE]
        )
        fit = torch.zeros(len(k), part.shape[1], dtype=part.dtype)
        for latent, n in enumerate(k):
            images = strongest[:n, latent]
            p = 0.998 - torch.arange(n, dtype=part.dtype)[:, None] / max(n, 1) * (0.998 - 0.97)
            fit[latent] = torch.log1p(p * (part[images] - 1) + _LEAST_P).sum(dim=0)
        used = fit[~abstains]
        prior = used.logsumexp(dim=0) - math.log(max(len(used), 1)) if len(used) else 0.0
        score = fit - weight * prior
        which = torch.arange(start, start + part.shape[1]).expand(len(k), -1)
        kept = [_best([*kept, (score, which)], n_best)]
    [(score, which)] = kept
    best = which.gather(1, score.argmax(dim=1, keepdim=True))[:, 0]
    return ConceptScores(score, which, torch.where(abstains, -1, best), abstains)


def _best(parts: list[tuple[Tensor, Tensor]], n: int | None) -> tuple[Tensor, Tensor]:
    """The n largest scores of each latent with their concepts, the best first; all if n is None."""
    score, which = (torch.cat(side, dim=1) for side in zip(*parts, strict=True))
    if n is None:
        return score, which
    top = score.sort(dim=1, descending=True, stable=True).indices[:, :n]
    return score.gather(1, top), which.gather(1, top)


class Enrichment(NamedTuple):
    """Classes against latents."""

    lift: Float64[np.ndarray, "d_sae word"]
    """Share of the class among firing images / its share among all."""
    p_value: Float64[np.ndarray, "d_sae word"]
    """One-sided Fisher, times the number of classes."""
    best: Int64[np.ndarray, " d_sae"]
    """The class of the smallest p-value, the larger lift among equals; -1 where the latent fires on
    too few images."""


def class_enrichment(
    fires: Bool[np.ndarray, "example d_sae"],
    has: Bool[np.ndarray, "row word"],
    *,
    least: int = 5,
) -> Enrichment:
    """Test every class, or attribute, against every latent by the hypergeometric distribution.

    Args:
        fires: Whether each latent fires in each image.
        has: Whether each image has each class or attribute, such as the folder it lies in.
        least: A latent that fires on fewer images is not labelled.

    Raises:
        ValueError: If there is only one class, or the images differ in number.
    """
    if has.shape[1] < 2:
        raise MonosemaError(f"classes must be at least two to be told apart, got {has.shape[1]}")
    if len(fires) != len(has):
        raise MonosemaError(f"fires must be of {len(has)} images, got {len(fires)}")
    n, n_fired, n_has = len(has), fires.sum(axis=0), has.sum(axis=0)
    both = fires.T.astype(np.int64) @ has.astype(np.int64)
    p = stats.hypergeom.sf(both - 1, n, n_has[None, :], n_fired[:, None])
    expected = n_fired[:, None] * n_has[None, :] / n
    lift = both / np.maximum(expected, 1e-12)
    order = np.lexsort((-lift, p), axis=1)
    best = np.where(n_fired >= least, order[:, 0], -1)
    return Enrichment(lift, np.minimum(p * has.shape[1], 1.0), best.astype(np.int64))


def spoken(name: str) -> str:
    """A folder's name as words: "food-fruit" and "food_fruit" are "food fruit"."""
    return " ".join(name.replace("-", " ").replace("_", " ").split())


def text_cosine(
    directions: Float[Tensor, "d_sae d_model"],
    texts: Float[Tensor, "word d_model"],
) -> Float[Tensor, "d_sae word"]:
    """Cosine of latents' directions and text embeddings, the texts without their common mean.

    A dictionary's directions have no offset of their modality, text embeddings have; taken off,
    a constant shift of all texts changes no name.

    Args:
        directions: Decoder rows, in the space of the embeddings.
        texts: One embedding per concept.

    Raises:
        ValueError: If there is only one concept to take the mean of.
    """
    if len(texts) < 2:
        raise MonosemaError(f"concepts must be at least two to be centred, got {len(texts)}")
    centred = torch.nn.functional.normalize(texts - texts.mean(dim=0), dim=1)
    return torch.nn.functional.normalize(directions, dim=1) @ centred.T


def splice(
    z: Float[Tensor, "batch d_model"], concepts: Float[Tensor, "word d_in"], penalty: float
) -> Float[Tensor, "batch word"]:
    """Sparse non-negative weights of concepts: min over w >= 0 of |z - C w|^2 + penalty |w|_1.

    SpLiCE (Bhalla et al. 2024, arXiv 2402.10376). Both sides are taken as they are: centre and
    normalise them first, each modality by its own mean.

    Raises:
        ValueError: If widths differ or the penalty is not positive.
    """
    if z.shape[1] != concepts.shape[1]:
        raise MonosemaError(f"concepts must be as wide as z, {z.shape[1]}, got {concepts.shape[1]}")
    if penalty <= 0:
        raise MonosemaError(f"penalty must be positive, got {penalty}")
    # scikit-learn minimises |z - C w|^2 / (2 d) + alpha |w|_1.
    model = Lasso(
        alpha=penalty / (2 * z.shape[1]), positive=True, fit_intercept=False, max_iter=10_000,
        tol=1e-6,
    )  # fmt: skip
    result = z.new_zeros(len(z), len(concepts))
    is_any = (z != 0).any(dim=1)  # of nothing no weights are sought: old releases never end there
    if bool(is_any.any()):
        model.fit(concepts.T.double().numpy(), z[is_any].T.double().numpy())
        result[is_any] = torch.from_numpy(model.coef_).reshape(-1, len(concepts)).to(z)
    return result


class ImageLabels(NamedTuple):
    """What each latent's images have in common."""

    concept: dict[Method, Int64[np.ndarray, " d_sae"]]
    """By method: the label; -1 where it abstains."""
    order: Int64[np.ndarray, "d_sae rank"]
    """Concepts, the most certain first: all classes, or the best words."""
    listed: Bool[np.ndarray, "d_sae rank"]
    """Which of them may stand beside the label."""
    p_value: Float64[np.ndarray, "d_sae rank"]
    """Their p of Fisher's test, one-sided, times the number of concepts."""
    joint: Int64[np.ndarray, "d_sae rank"]
    """Images of the explain split with the concept on which the latent fires."""
    n_has: Int64[np.ndarray, " word"]
    """Images of the explain split with each concept."""


@dataclass(frozen=True)
class ByClass:
    """Labels that are classes or groups of classes."""

    concepts: "Concepts"
    """What they may be."""
    has: tuple[Bool[np.ndarray, "example word"], Bool[np.ndarray, "other word"]]
    """Which concepts the images of the explain and of the score split have."""
    config: ImageLabelConfig
    """How they are made."""
    folders = None

    @property
    def method(self) -> Method:
        """What makes them."""
        return self.config.method

    @property
    def names(self) -> tuple[str, ...]:
        """What the concepts are called."""
        return self.concepts.names

    def kind(self, concept: int) -> str:
        """`class` or `group`."""
        return self.concepts.kind(concept)

    def each_to_tell(self, _labels: Int64[np.ndarray, " d_sae"]) -> Int64[np.ndarray, " class"]:
        """The concepts for each of which the best latent is looked for: the classes."""
        return np.arange(self.concepts.n_classes)

    def exchanged(self, generator: np.random.Generator) -> "ByClass":
        """The same with the images of each split exchanged."""
        explain, score = (generator.permutation(has) for has in self.has)
        return replace(self, has=(explain, score))

    def labels(self, peaks: Float32[np.ndarray, "example d_sae"]) -> ImageLabels:
        """Label every latent by both methods, from its peaks on the explain split.

        A latent that fires on fewer than `min_images` images, or whose best class is less certain
        than `max_p`, gets no label of enrichment. Soft-WPMI sees classes alone, because it shares
        the probability of an image between the concepts that it has.
        """
        fires, has, least = peaks > 0, self.has[0], self.config.min_images
        result = class_enrichment(fires, has, least=least)
        order = np.lexsort((-result.lift, result.p_value), axis=1)
        p_value = np.take_along_axis(result.p_value, order, axis=1)
        classes = torch.from_numpy(has[:, : self.concepts.n_classes].astype(np.float32))
        by_images = soft_wpmi(torch.from_numpy(peaks), classes, least=least)
        certain = p_value <= self.config.max_p
        concept: dict[Method, np.ndarray] = {
            "enrichment": np.where(certain[:, 0], result.best, -1),
            "soft_wpmi": by_images.best.numpy().astype(np.int64),
        }
        joint = np.take_along_axis(fires.T.astype(np.int64) @ has.astype(np.int64), order, axis=1)
        return ImageLabels(concept, order, certain, p_value, joint, has.sum(axis=0))


@dataclass(frozen=True)
class ByWords:
    """Labels that are words."""

    names: tuple[str, ...]
    """What they may be."""
    texts: Float32[Tensor, "word d_model"]
    """Embeddings of the words."""
    images: Float32[Tensor, "example d_model"]
    """Of the images of the explain split."""
    has: tuple[Bool[np.ndarray, "example word"], Bool[np.ndarray, "other word"]]
    """Which words the images of the explain and of the score split count as having."""
    folders: Bool[np.ndarray, "other word"] | None
    """Which images of the score split lie in the folder that a word names; None if no word does."""
    config: WordsConfig
    """How labels are made."""
    least: int
    """A latent that fires on fewer images is not labelled."""
    n_listed: int
    """Words that are kept of each latent."""

    @property
    def method(self) -> Method:
        """What makes them."""
        return self.config.method

    def kind(self, _concept: int) -> str:
        """What a label is."""
        return "image word"

    def each_to_tell(self, labels: Int64[np.ndarray, " d_sae"]) -> Int64[np.ndarray, " class"]:
        """The concepts for each of which the best latent is looked for: those that are labels."""
        return np.unique(labels[labels >= 0])

    def exchanged(self, generator: np.random.Generator) -> "ByWords":
        """The same with the images of each split exchanged."""
        order, other = (generator.permutation(len(has)) for has in self.has)
        has = (self.has[0][order], self.has[1][other])
        return replace(self, images=self.images[torch.from_numpy(order)], has=has)

    def labels(self, peaks: Float32[np.ndarray, "example d_sae"]) -> ImageLabels:
        """Label every latent from its peaks on the explain split.

        The text direction is that of the latent's images, weighted by its peaks, without the mean
        image; SpLiCE writes the same direction as few words.
        """
        fires, peaks_of, n = peaks > 0, torch.from_numpy(peaks), self.n_listed
        made = soft_wpmi(peaks_of, self.images @ self.texts.T, least=self.least, n_best=n)
        too_few = made.abstains[:, None]
        towards = peaks_of.T @ (self.images - self.images.mean(dim=0))
        near = text_cosine(towards, self.texts)
        of_method: dict[Method, Tensor] = {
            "clip_dissect": made.concept,
            "text_direction": _first(near, n),
        }
        if self.method == "splice":
            unit = torch.nn.functional.normalize
            centred = unit(self.texts - self.texts.mean(dim=0), dim=1)
            weights = splice(unit(towards, dim=1), centred, self.config.penalty)
            of_method["splice"] = torch.where(
                weights.amax(1, keepdim=True) > 0, _first(weights, n), -1
            )
        concept: dict[Method, np.ndarray] = {
            name: torch.where(too_few, -1, which)[:, 0].numpy() for name, which in of_method.items()
        }
        order, n_has = of_method[self.method].numpy(), self.has[0].sum(axis=0)
        joint = np.stack([(self.has[0][:, w] & fires).sum(axis=0) for w in order.T], axis=1)
        n_fired = fires.sum(axis=0)[:, None]
        p = stats.hypergeom.sf(joint - 1, len(fires), n_has[order], n_fired) * len(self.names)
        return ImageLabels(
            concept, order, order >= 0, np.minimum(p, 1.0), joint.astype(np.int64), n_has
        )


def _first(scores: Float[Tensor, "d_sae word"], n: int) -> Int64[Tensor, "d_sae rank"]:
    return scores.topk(min(n, scores.shape[1]), dim=1).indices


class Concepts(NamedTuple):
    """Classes, then groups of classes."""

    names: tuple[str, ...]
    """What they are called."""
    n_classes: int
    """The first so many are classes, the others groups."""
    of_class: Bool[np.ndarray, "row word"]
    """Which concepts an image of each class has."""

    def kind(self, concept: int) -> str:
        """`class` or `group`."""
        return "class" if concept < self.n_classes else "group"

    def has(self, classes: Int[np.ndarray, " example"]) -> Bool[np.ndarray, "example word"]:
        """Which concepts images have, by the numbers of their classes."""
        return self.of_class[classes]


def concepts_of(classes: tuple[str, ...], separator: str | None) -> Concepts:
    """The classes, and the groups that at least two but not all of them belong to.

    Args:
        classes: Names of the classes.
        separator: What ends the name of the group in the name of a class; None for no groups.

    Raises:
        ValueError: If there are not two classes.
    """
    if len(classes) < 2:
        listed = f"1 ({classes[0]})" if classes else "none"
        raise MonosemaError(
            f"images must be of two classes or more to be labelled, got {listed}; put the images "
            "of each class into a folder of its own"
        )
    groups = [name.partition(separator)[0] if separator else "" for name in classes]
    shared = sorted({g for g in groups if g and 2 <= groups.count(g) < len(classes)} - set(classes))
    identity = np.eye(len(classes), dtype=bool)
    of_group = np.array([[group == name for name in shared] for group in groups], bool)
    of_class = np.concatenate([identity, of_group.reshape(len(classes), len(shared))], axis=1)
    return Concepts((*classes, *shared), len(classes), of_class)
