"""Soft weighted PMI of CLIP-Dissect (Oikarinen and Weng 2023, arXiv 2204.10965)."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
        raise ValueError(f"concepts must be at least two to be told apart, got {n_concepts}")
    if len(activations) != n_images:
        raise ValueError(f"activations must be of {n_images} images, got {len(activations)}")
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
