"""A class or group for every latent, from the explain split alone; abstention where none fits."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64

from sae.explain.vision.config import ImageLabelConfig, Method
from sae.explain.vision.enrichment import class_enrichment
from sae.explain.vision.soft_wpmi import soft_wpmi


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
    found = class_enrichment(fires, has, least=config.min_images)
    order = np.lexsort((-found.lift, found.p_value), axis=1)
    certain = np.take_along_axis(found.p_value, order[:, :1], axis=1)[:, 0] <= config.max_p
    by_images = soft_wpmi(
        torch.from_numpy(peaks),
        torch.from_numpy(has[:, :n_classes].astype(np.float32)),
        least=config.min_images,
    )
    concept: dict[Method, np.ndarray] = {
        "enrichment": np.where(certain, found.best, -1),
        "soft_wpmi": by_images.best.numpy().astype(np.int64),
    }
    joint = fires.T.astype(np.int64) @ has.astype(np.int64)
    return ImageLabels(concept, order, found.p_value, joint, has.sum(axis=0))


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
