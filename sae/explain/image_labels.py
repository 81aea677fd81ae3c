"""A class or group of classes for every latent, from the explain split alone, or no label.

Enrichment with p-values says which classes or attributes a latent prefers; soft weighted PMI of
CLIP-Dissect (Oikarinen and Weng 2023, arXiv 2204.10965) compares concepts. Windows of paired texts
let an image latent be explained by the captions of its images.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64
from scipy import stats
from torch import Tensor

from monosema.checks import MonosemaError
from sae.explain.config import ImageLabelConfig, Method
from sae.explain.windows import LatentWindows, Window


class ConceptScores(NamedTuple):
    """How well each concept fits each latent."""

    score: Float[Tensor, "d_sae word"]
    """Larger is better; comparable within a latent only."""
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
) -> ConceptScores:
    """Score every concept for every latent.

    P = softmax over concepts of temperature x similarity; for the k = min(top, images that fire)
    strongest images of a latent, with p falling linearly from 0.998 to 0.97:
    score = sum_x log(1 + p_x (P_xm - 1)) - weight x log mean over latents of exp(that sum).
    A latent that fires on fewer than `top` images would otherwise be described by images on which
    it is silent.

    Args:
        activations: One figure per image and latent, such as the largest over patches.
        similarity: Cosine of each of the same images and concept.
        top: Most images per latent.
        least: A latent with fewer firing images is not labelled.
        temperature: Sharpness of the softmax.
        weight: Lambda, how much a concept that fits all latents is held down.

    Raises:
        ValueError: If there is only one concept, or the images differ in number.
    """
    n_images, n_concepts = similarity.shape
    if n_concepts < 2:
        raise MonosemaError(f"concepts must be at least two to be told apart, got {n_concepts}")
    if len(activations) != n_images:
        raise MonosemaError(f"activations must be of {n_images} images, got {len(activations)}")
    log_p = (temperature * similarity).softmax(dim=1)
    n_firing = (activations > 0).sum(dim=0)
    k = n_firing.clamp(max=min(top, n_images))
    strongest = activations.topk(min(top, n_images), dim=0).indices  # (k, d_sae)
    fit = torch.zeros(activations.shape[1], n_concepts)
    for latent in range(activations.shape[1]):
        images = strongest[: k[latent], latent]
        p = torch.linspace(0.998, 0.97, len(images))[:, None]
        fit[latent] = torch.log1p(p * (log_p[images] - 1)).sum(dim=0)
    abstains = n_firing < least
    used = fit[~abstains]
    prior = used.logsumexp(dim=0) - math.log(max(len(used), 1)) if len(used) else 0.0
    score = fit - weight * prior
    return ConceptScores(score, torch.where(abstains, -1, score.argmax(dim=1)), abstains)


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


class ImageLabels(NamedTuple):
    """What each latent's images have in common."""

    concept: dict[Method, Int64[np.ndarray, " d_sae"]]
    """By method: the label; -1 where it abstains."""
    order: Int64[np.ndarray, "d_sae word"]
    """All concepts, the most certain first."""
    p_value: Float64[np.ndarray, "d_sae word"]
    """Fisher's, one-sided, times the number of concepts."""
    joint: Int64[np.ndarray, "d_sae word"]
    """Images of the explain split with the concept on which the latent fires."""
    n_has: Int64[np.ndarray, " word"]
    """Images of the explain split with the concept."""


def make_labels(
    peaks: Float32[np.ndarray, "example d_sae"],
    has: Bool[np.ndarray, "example word"],
    n_classes: int,
    config: ImageLabelConfig,
) -> ImageLabels:
    """Label every latent by both methods.

    A latent that fires on fewer than `min_images` images, or whose best class is less certain than
    `max_p`, gets no label of enrichment. Soft-WPMI sees classes alone, because it shares the
    probability of an image between the concepts that it has.

    Args:
        peaks: Of the images of the explain split.
        has: Their concepts, the classes first.
        n_classes: How many are classes.
        config: How.
    """
    fires = peaks > 0
    result = class_enrichment(fires, has, least=config.min_images)
    order = np.lexsort((-result.lift, result.p_value), axis=1)
    certain = np.take_along_axis(result.p_value, order[:, :1], axis=1)[:, 0] <= config.max_p
    by_images = soft_wpmi(
        torch.from_numpy(peaks),
        torch.from_numpy(has[:, :n_classes].astype(np.float32)),
        least=config.min_images,
    )
    concept: dict[Method, np.ndarray] = {
        "enrichment": np.where(certain, result.best, -1),
        "soft_wpmi": by_images.best.numpy().astype(np.int64),
    }
    joint = fires.T.astype(np.int64) @ has.astype(np.int64)
    return ImageLabels(concept, order, result.p_value, joint, has.sum(axis=0))


def mutual_information(joint: int, n_fired: int, n_has: int, n_images: int) -> tuple[float, float]:
    """Of firing and having, over images: in nats, and NPMI (-1: never together)."""
    table = np.array([
        [joint, n_fired - joint],
        [n_has - joint, n_images - n_fired - n_has + joint],
    ]) / n_images  # fmt: skip
    expected = np.outer(table.sum(axis=1), table.sum(axis=0))
    there = table > 0
    information = float((table[there] * np.log(table[there] / expected[there])).sum())
    share = float(table[0, 0])
    if share <= 0:
        return information, -1.0
    npmi = 1.0 if share == 1 else float(np.log(share / expected[0, 0]) / -np.log(share))
    return information, npmi


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


def caption_windows(latent: LatentWindows, captions: Sequence[str]) -> LatentWindows:
    """The latent with each image replaced by its caption or report, and all of it marked.

    This is the idea of SAE-Rad (Abdulaal et al. 2024, arXiv 2410.03334): explainers and the
    detection scorer then work on images as they do on text. The activation of a caption is the
    image's peak.

    Args:
        latent: Windows that are whole images.
        captions: One text per example of the cache.
    """

    def captioned(window: Window) -> Window:
        return Window(
            window.example, 0, (captions[window.example],), (window.peak,), window.source,
            window.bucket, window.inclusion,
        )  # fmt: skip

    explain, score = (tuple(map(captioned, part)) for part in (latent.explain, latent.score))
    return LatentWindows(latent.latent, latent.max_activation, latent.density, explain, score)
