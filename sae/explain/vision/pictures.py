"""The pictures in which a latent fires most, and some of each step of its activation."""

from collections.abc import Iterator, Sequence

import numpy as np

from sae.explain.examples import Context
from sae.explain.vision.config import ImageLabelConfig
from sae.explain.vision.firing import ImagePart

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
    own = np.concatenate([np.arange(part.n_images) for part in parts])
    firing = [part.of(latent) for part in parts]
    for rank, at in enumerate(_chosen(peaks, config).tolist()):
        which, image = int(whose[at]), int(own[at])
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
