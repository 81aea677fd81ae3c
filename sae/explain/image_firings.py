"""What latents do on the images of one split: on which patches, and their peak on each image.

The pictures in which a latent fires most, and some of each step of its activation; how often the
strongest of them have its label.

Concepts by the direction of text embeddings: cosine with both modalities centred, and SpLiCE.

Windows of paired texts let an image latent be explained by the captions of its images.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from numpy.typing import NDArray
from sklearn.linear_model import Lasso
from torch import Tensor

from activations_cache.checks import MonosemaError, Progress
from sae.autoencoder import SparseAutoencoder
from sae.explain.config import ImageLabelConfig
from sae.explain.examples import Context
from sae.explain.firings import Codes, encode_rows
from sae.explain.scores import Mean
from sae.explain.text_at_rows import Cache
from sae.explain.windows import LatentWindows, Window


class PatchFiring(NamedTuple):
    """Where a latent fires."""

    image: Int64[np.ndarray, " entry"]
    """Index into the images of the split; ascends."""
    patch: Int64[np.ndarray, " entry"]
    """Number of the patch in its image; those behind the patches are no place in the picture."""
    value: Float32[np.ndarray, " entry"]
    """Activation."""


class ImagePart:
    """The images of a split, and all firings on them.

    Args:
        dictionary: What encodes.
        cache: Of images.
        hook_point: Which rows.
        split: Name of the split.
        progress: Called with the unit "rows encoded".
        any_class: Whether images without a class count as well.

    Raises:
        ValueError: If the split has no image, or none with a class.
    """

    def __init__(
        self,
        dictionary: SparseAutoencoder,
        cache: Cache,
        hook_point: str,
        split: str,
        progress: Progress,
        *,
        any_class: bool = False,
    ) -> None:
        self.split = split
        rows = cache.rows((split,))
        label = cache.token_labels(rows)
        if not any_class:
            rows, label = rows[label >= 0], label[label >= 0]
        if len(rows) == 0:
            what = "images" if any_class else "images with a class"
            raise MonosemaError(f"split {split!r} must have {what}, got none; build a larger cache")
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
        """Class of each image; -1 for none."""
        self.codes: Codes = encode_rows(dictionary, cache[hook_point], rows[order], progress)

    @property
    def n_images(self) -> int:
        """How many there are."""
        return len(self.numbers)

    def of(self, latent: int) -> PatchFiring:
        """Where one latent fires."""
        rows, values = self.codes.of(latent)
        return PatchFiring(self._image[rows], self._patch[rows], values)

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


N_STRONGEST = 5
"""So many images of the score split are a latent's strongest."""

Z = 1.959964
"""Half of a 95 % interval in standard errors."""

NO_MEAN = Mean(float("nan"), float("nan"), float("nan"))
"""Where there is nothing to take the mean of."""

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


def spoken(name: str) -> str:
    """A folder's name as words: "food-fruit" and "food_fruit" are "food fruit"."""
    return " ".join(name.replace("-", " ").replace("_", " ").split())


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
    result = z.new_zeros(len(z), len(concepts))
    is_any = (z != 0).any(dim=1)  # of nothing no weights are sought: old releases never end there
    if bool(is_any.any()):
        model.fit(concepts.T.double().numpy(), z[is_any].T.double().numpy())
        result[is_any] = torch.from_numpy(model.coef_).reshape(-1, len(concepts)).to(z)
    return result


class Captions(NamedTuple):
    """What was written about the images of a cache."""

    texts: Sequence[str]
    """One for each example of the cache."""
    facts: Mapping[str, Any]
    """What is recorded of them."""


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
