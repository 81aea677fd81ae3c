"""What latents do on the images of one split: on which patches, and their peak on each image.

The pictures in which a latent fires most, and some of each step of its activation.

Concepts by the direction of text embeddings: cosine with both modalities centred, and SpLiCE.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy.typing import NDArray
from sklearn.linear_model import Lasso
from torch import Tensor

from activations_cache.checks import MonosemaError, Progress
from sae.autoencoder import SparseAutoencoder
from sae.explain.config import ImageLabelConfig
from sae.explain.examples import Context
from sae.explain.firings import Codes, encode_rows
from sae.explain.text_at_rows import Cache


class PatchFiring(NamedTuple):
    """Where a latent fires."""

    image: Int64[np.ndarray, " entry"]
    """Index into the images of the split; ascends."""
    patch: Int64[np.ndarray, " entry"]
    """Number of the patch in its image; those behind the patches are no place in the picture."""
    value: Float32[np.ndarray, " entry"]
    """Activation."""


class ImageEvidence(NamedTuple):
    """What labels and scores are made of: images, their peaks and classes."""

    peaks: Float32[np.ndarray, "example d_sae"]
    """Largest activation of each latent on each image; 0 where it is silent."""
    classes: Int64[np.ndarray, " example"]
    """Number of each image's class."""


class ImagePart:
    """The images of a split that have a class, and all firings on them.

    Args:
        dictionary: What encodes.
        cache: Of images.
        hook_point: Which rows.
        split: Name of the split.
        progress: Called with the unit "rows encoded".

    Raises:
        ValueError: If the split has no image with a class.
    """

    def __init__(
        self,
        dictionary: SparseAutoencoder,
        cache: Cache,
        hook_point: str,
        split: str,
        progress: Progress,
    ) -> None:
        self.split = split
        rows = cache.rows((split,))
        label = cache.token_labels(rows)
        rows, label = rows[label >= 0], label[label >= 0]
        if len(rows) == 0:
            raise MonosemaError(
                f"split {split!r} must have images with a class, got none; build a larger cache"
            )
        refs = cache.refs(rows)
        order = torch.from_numpy(np.lexsort((_patch(refs), refs.example.numpy())))
        self._patch = _patch(refs)[order]
        numbers, first, image = np.unique(
            refs.example.numpy()[order], return_index=True, return_inverse=True
        )
        self.numbers: NDArray[np.int64] = numbers
        """Numbers of the images in the cache."""
        self._image = image
        self.classes: NDArray[np.int64] = label[order].numpy()[first]
        """Class of each image."""
        self.codes: Codes = encode_rows(dictionary, cache[hook_point], rows[order], progress)

    @property
    def n_images(self) -> int:
        """How many there are."""
        return len(self.numbers)

    def of(self, latent: int) -> PatchFiring:
        """Where one latent fires."""
        rows, values = self.codes.of(latent)
        return PatchFiring(self._image[rows], self._patch[rows], values)

    def seen(self, first: int, last: int) -> ImageEvidence:
        """Peaks of the latents first, ..., last - 1, and the classes."""
        return ImageEvidence(self.peaks[:, first:last], self.classes)

    @cached_property
    def peaks(self) -> Float32[np.ndarray, "example d_sae"]:
        """Largest activation of each latent on each image; 0 where it is silent."""
        result = np.zeros((self.n_images, self.codes.d_sae), np.float32)
        latent = np.repeat(np.arange(self.codes.d_sae), self.codes.n_fired)
        np.maximum.at(result, (self._image[self.codes.row], latent), self.codes.value)
        return result


def _patch(refs: object) -> Int64[np.ndarray, " row"]:
    token = getattr(refs, "token")  # noqa: B009
    return token.numpy().astype(np.int64)


N_FIFTHS = 5
"""Equal steps from 0 to a latent's largest activation."""


def top_pictures(
    parts: Sequence[ImagePart],
    latent: int,
    n_patches: int,
    names: Sequence[str],
    config: ImageLabelConfig,
) -> Iterator[Context]:
    """The images of one latent, the largest peak first, as contexts without tokens.

    `activations` has one figure per patch, row by row, and `peak` is the largest one's number;
    neither counts positions that are no patch. `source` is the picture's name.

    Args:
        parts: The splits.
        latent: Which.
        n_patches: Patches of an image.
        names: What the images of the cache are called, by number.
        config: How many.
    """
    peaks = np.concatenate([part.peaks[:, latent] for part in parts])
    whose = np.repeat(np.arange(len(parts)), [part.n_images for part in parts])
    numbers = np.concatenate([np.arange(part.n_images) for part in parts])
    firing = [part.of(latent) for part in parts]
    for rank, at in enumerate(_chosen(peaks, config).tolist()):
        which, image = int(whose[at]), int(numbers[at])
        part, inside = parts[which], firing[which].image == image
        patch, value = firing[which].patch[inside], firing[which].value[inside]
        heat = np.zeros(n_patches, np.float32)
        heat[patch[patch < n_patches]] = value[patch < n_patches]
        number = int(part.numbers[image])
        yield Context(
            latent=latent,
            rank=rank,
            activation=float(peaks[at]),
            example=number,
            split=part.split,
            source=names[number],
            start=0,
            peak=int(heat.argmax()),
            tokens=(),
            activations=tuple(heat.tolist()),
        )


def _chosen(peaks: np.ndarray, config: ImageLabelConfig) -> np.ndarray:
    """The largest peaks, then the same number of each fifth, evenly spread, descending."""
    order = np.argsort(-peaks, kind="stable")[: int((peaks > 0).sum())]
    if len(order) == 0:
        return order
    top, rest = order[: config.top_images], order[config.top_images :]
    fifth = np.ceil(peaks[rest] / peaks[order[0]] * N_FIFTHS)
    chosen = [top]
    for step in range(N_FIFTHS, 0, -1):
        inside, n = rest[fifth == step], config.bucket_images
        chosen.append(inside[np.arange(min(n, len(inside))) * len(inside) // max(n, 1)])
    return np.concatenate(chosen)


def text_cosine(
    directions: Float[Tensor, "d_sae d_model"],
    texts: Float[Tensor, "word d_model"],
    other_texts: Float[Tensor, "batch d_model"] | None = None,
) -> Float[Tensor, "d_sae word"]:
    """Cosine of latents' directions and text embeddings, the texts without their common mean.

    A dictionary's directions have no offset of their modality, text embeddings have; taken off,
    a constant shift of all texts changes no name.

    Args:
        directions: Decoder rows, in the space of the embeddings.
        texts: One embedding per concept.
        other_texts: Where the mean is taken; the concepts themselves when absent.

    Raises:
        ValueError: If there is only one concept to take the mean of.
    """
    population = texts if other_texts is None else other_texts
    if len(population) < 2:
        raise MonosemaError(f"concepts must be at least two to be centred, got {len(population)}")
    centred = torch.nn.functional.normalize(texts - population.mean(dim=0), dim=1)
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
    model.fit(concepts.T.double().numpy(), z.T.double().numpy())
    return torch.from_numpy(model.coef_).reshape(len(z), len(concepts)).to(z)
