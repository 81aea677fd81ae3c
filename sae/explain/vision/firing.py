"""What latents do on the images of one split: on which patches, and their peak on each image."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy.typing import NDArray

from activations_cache.progress import Progress
from sae.autoencoder import SparseAutoencoder
from sae.explain.codes import Codes, encode_rows
from sae.explain.words import Cache


class Firing(NamedTuple):
    """Where a latent fires."""

    image: Int64[np.ndarray, " entry"]
    """Index into the images of the split; ascends."""
    patch: Int64[np.ndarray, " entry"]
    """Number of the patch in its image; those behind the patches are no place in the picture."""
    value: Float32[np.ndarray, " entry"]
    """Activation."""


class Seen(NamedTuple):
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
            raise ValueError(
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

    def of(self, latent: int) -> Firing:
        """Where one latent fires."""
        rows, values = self.codes.of(latent)
        return Firing(self._image[rows], self._patch[rows], values)

    def seen(self, first: int, last: int) -> Seen:
        """Peaks of the latents first, ..., last - 1, and the classes."""
        return Seen(self.peaks[:, first:last], self.classes)

    @cached_property
    def peaks(self) -> Float32[np.ndarray, "example d_sae"]:
        """Largest activation of each latent on each image; 0 where it is silent."""
        found = np.zeros((self.n_images, self.codes.d_sae), np.float32)
        latent = np.repeat(np.arange(self.codes.d_sae), self.codes.n_fired)
        np.maximum.at(found, (self._image[self.codes.row], latent), self.codes.value)
        return found


def _patch(refs: object) -> Int64[np.ndarray, " row"]:
    token = getattr(refs, "token")  # noqa: B009
    return token.numpy().astype(np.int64)
