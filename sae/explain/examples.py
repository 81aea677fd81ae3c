"""What latents do on the rows of a split, and the texts or images in which they fire most."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int32, Int64
from torch import Tensor

from activations_cache.tokens import PieceTable
from monosema.checks import MonosemaError
from sae.explain.config import ExplainConfig, ImageLabelConfig
from sae.explain.firings import Codes
from sae.explain.text_at_rows import Cache, CachedTexts, RowText

N_FIFTHS = 5
"""Equal steps from 0 to a latent's largest activation."""


@dataclass(frozen=True)
class SplitCodes:
    """What the latents do on the rows of one split."""

    split: str
    """Name of the split."""
    codes: Codes
    """Firings on its rows."""


@dataclass(frozen=True)
class SplitFirings(SplitCodes):
    """The same with the texts."""

    text: RowText
    """The text at its rows."""


@dataclass(frozen=True)
class Context:
    """A piece of text around one of the largest activations of a latent, or an image."""

    latent: int
    """Number of the latent."""
    rank: int
    """0 for the context with the largest peak."""
    activation: float
    """Activation at the peak."""
    example: int
    """Number of the example in the cache."""
    split: str
    """Whether labels were made from this example ("explain") or scored on it ("score")."""
    source: str
    """Where the text comes from."""
    start: int
    """Position of the first token in the example."""
    peak: int
    """Index in `tokens` of the largest activation."""
    tokens: tuple[str, ...]
    """The tokens as text."""
    activations: tuple[float, ...]
    """The latent's activation on each token, 0 where it is silent."""


def shown_of(peaks: Float32[np.ndarray, " example"], n_top: int, n_each: int) -> np.ndarray:
    """Which examples are shown of a latent that fires, by its peaks; those with 0 are not.

    Those with the largest peaks, then `n_each` of each fifth, spread evenly over it.
    """
    order = np.argsort(-peaks, kind="stable")
    order = order[peaks[order] != 0]
    if len(order) == 0:
        return order
    rest, largest = order[n_top:], peaks[order[0]]
    fifth = np.ceil(peaks[rest] / largest * N_FIFTHS)
    shown = [order[:n_top]]
    for step in range(N_FIFTHS, 0, -1):
        inside = rest[fifth == step]
        n = min(n_each, len(inside))
        shown.append(inside[np.arange(n) * len(inside) // max(n, 1)])
    return np.concatenate(shown)


class _LatentFirings(NamedTuple):
    """The firings of one latent in both splits."""

    example: np.ndarray
    position: np.ndarray
    value: np.ndarray
    part: np.ndarray  # index of the split


class ContextFinder:
    """Finds the top contexts of latents."""

    def __init__(
        self,
        parts: Sequence[SplitFirings],
        examples: CachedTexts,
        pieces: PieceTable,
        config: ExplainConfig,
    ) -> None:
        """Keep what every latent needs.

        Args:
            parts: The splits from which contexts are taken.
            examples: The texts.
            pieces: Their text, token by token.
            config: How many contexts, and how long.
        """
        self._parts = parts
        self._pieces = pieces
        self._source = examples.source.numpy()
        self._source_names = examples.source_names
        self._config = config
        self._n_tokens = np.zeros(len(pieces.ids), np.int64)  # up to the last row: no padding
        for part in parts:
            np.maximum.at(self._n_tokens, part.text.example, part.text.position + 1)

    def find(self, latent: int) -> Iterator[Context]:
        """The contexts of one latent, each from another example, the largest peak first."""
        fired = self._fired(latent)
        if len(fired.value) == 0:
            return
        starts = np.flatnonzero(np.diff(fired.example, prepend=-1))
        ends = np.append(starts[1:], len(fired.value))
        peaks = np.maximum.reduceat(fired.value, starts)
        shown = shown_of(peaks, self._config.top_contexts, self._config.contexts_per_fifth)
        for rank, run in enumerate(shown):
            inside = _LatentFirings(*(array[starts[run] : ends[run]] for array in fired))
            yield self._context(latent, rank, inside)

    def _fired(self, latent: int) -> _LatentFirings:
        columns = []
        for index, part in enumerate(self._parts):
            rows, values = part.codes.of(latent)
            text = part.text
            whose = np.full(len(rows), index)
            columns.append((text.example[rows], text.position[rows], values, whose))
        return _LatentFirings(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    def _context(self, latent: int, rank: int, fired: _LatentFirings) -> Context:
        example, top = int(fired.example[0]), int(fired.value.argmax())
        width = min(self._config.context_tokens, int(self._n_tokens[example]))
        peak = int(fired.position[top])
        start = min(max(peak - width // 2, 0), int(self._n_tokens[example]) - width)
        shown = (fired.position >= start) & (fired.position < start + width)
        activations = np.zeros(width, np.float32)
        activations[fired.position[shown] - start] = fired.value[shown]
        shown_ids = self._pieces.ids[example, start : start + width].tolist()
        return Context(
            latent=latent,
            rank=rank,
            activation=float(fired.value[top]),
            example=example,
            split=self._parts[fired.part[0]].split,
            source=self._source_names[self._source[example]],
            start=start,
            peak=peak - start,
            tokens=tuple([self._pieces.names[i] for i in shown_ids]),
            activations=tuple(activations.tolist()),
        )


class Activity(NamedTuple):
    """How often and how strongly the latents fire in both splits together."""

    n_fired: Int64[np.ndarray, " d_sae"]
    """Rows on which each fires."""
    density: Float[np.ndarray, " d_sae"]
    """The same as a share of all rows."""
    max_activation: Float32[np.ndarray, " d_sae"]
    """Largest activation; 0 for a dead latent."""
    histogram: Int32[np.ndarray, "d_sae bin"]
    """Counts of activations in equal steps from 0 to the largest; silent rows are left out."""


def activity(parts: Sequence[SplitCodes], n_bins: int) -> Activity:
    """Count firings, and sort their activations into `n_bins` steps per latent."""
    d_sae = parts[0].codes.d_sae
    n_fired = sum((part.codes.n_fired for part in parts), np.zeros(d_sae, np.int64))
    largest = np.zeros(d_sae, np.float32)
    for part in parts:
        fires = part.codes.n_fired > 0
        if fires.any():
            peaks = np.maximum.reduceat(part.codes.value, part.codes.start[fires])
            largest[fires] = np.maximum(largest[fires], peaks)
    histogram = sum(
        (_histogram(part.codes, largest, n_bins) for part in parts),
        np.zeros((d_sae, n_bins), np.int32),
    )
    n_rows = sum(part.codes.n_rows for part in parts)
    return Activity(n_fired, (n_fired / n_rows).astype(np.float32), largest, histogram)


def _histogram(codes: Codes, largest: np.ndarray, n_bins: int) -> np.ndarray:
    counts = np.zeros((codes.d_sae, n_bins), np.int32)
    for latent in np.flatnonzero(largest > 0):
        share = codes.of(int(latent)).values / largest[latent]
        step = np.clip((share * n_bins).astype(np.int64), 0, n_bins - 1)
        counts[latent] = np.bincount(step, minlength=n_bins)
    return counts


class PatchFiring(NamedTuple):
    """Where a latent fires on images."""

    image: Int64[np.ndarray, " entry"]
    """Index into the images of the split; ascends."""
    patch: Int64[np.ndarray, " entry"]
    """Number of the patch in its image; those behind the patches are no place in the picture."""
    value: Float32[np.ndarray, " entry"]
    """Activation."""


@dataclass(frozen=True)
class SplitImages:
    """The rows of the images of one split."""

    ids: Int[Tensor, " row"]
    """Their ids in the cache, in the order of (image, patch)."""
    image: Int64[np.ndarray, " row"]
    """Index of each row's image among the images of the split."""
    patch: Int64[np.ndarray, " row"]
    """Number of each row's patch."""
    numbers: Int[np.ndarray, " example"]
    """Numbers of the images in the cache."""
    classes: Int[np.ndarray, " example"]
    """Class of each image; -1 for none."""


def image_rows(cache: Cache, split: str, *, any_class: bool) -> SplitImages:
    """The rows of a split's images that have a class, or of all of them.

    Raises:
        ValueError: If there are none.
    """
    rows = cache.rows((split,))
    label = cache.token_labels(rows)
    if not any_class:
        rows, label = rows[label >= 0], label[label >= 0]
    if len(rows) == 0:
        what = "images" if any_class else "images with a class"
        raise MonosemaError(f"split {split!r} must have {what}, got none; build a larger cache")
    refs = cache.refs(rows)
    example, patch = refs.example.numpy(), refs.token.numpy().astype(np.int64)
    order = np.lexsort((patch, example))
    numbers, first, image = np.unique(example[order], return_index=True, return_inverse=True)
    classes = label.numpy()[order][first]
    return SplitImages(rows[torch.from_numpy(order)], image, patch[order], numbers, classes)


@dataclass(frozen=True)
class ImagePart(SplitCodes):
    """What the latents do on the images of one split."""

    rows: SplitImages
    """Which images."""

    @property
    def n_images(self) -> int:
        """How many there are."""
        return len(self.rows.numbers)

    def of(self, latent: int) -> PatchFiring:
        """Where one latent fires."""
        rows, values = self.codes.of(latent)
        return PatchFiring(self.rows.image[rows], self.rows.patch[rows], values)

    @cached_property
    def peaks(self) -> Float32[np.ndarray, "example d_sae"]:
        """Largest activation of each latent on each image; 0 where it is silent."""
        result = np.zeros((self.n_images, self.codes.d_sae), np.float32)
        latent = np.repeat(np.arange(self.codes.d_sae), self.codes.n_fired)
        np.maximum.at(result, (self.rows.image[self.codes.row], latent), self.codes.value)
        return result


def top_pictures(
    parts: Sequence[ImagePart],
    n_patches: int,
    names: Sequence[str],
    config: ImageLabelConfig,
    latent: int,
) -> Iterator[Context]:
    """The images of one latent, the largest peak first, as contexts without tokens.

    `activations` has one figure per patch, row by row, and `peak` is the largest one's number;
    neither counts positions that are no patch. `source` is the picture's name.

    Args:
        parts: The splits.
        n_patches: Patches of an image.
        names: What the images of the cache are called, by number.
        config: How many.
        latent: Which.
    """
    peaks = np.concatenate([part.peaks[:, latent] for part in parts])
    whose = np.repeat(np.arange(len(parts)), [part.n_images for part in parts])
    numbers = np.concatenate([np.arange(part.n_images) for part in parts])
    firing = [part.of(latent) for part in parts]
    for rank, at in enumerate(shown_of(peaks, config.top_images, config.images_per_fifth).tolist()):
        which, image = int(whose[at]), int(numbers[at])
        part, inside = parts[which], firing[which].image == image
        patch, value = firing[which].patch[inside], firing[which].value[inside]
        heat = np.zeros(n_patches, np.float32)
        heat[patch[patch < n_patches]] = value[patch < n_patches]
        number = int(part.rows.numbers[image])
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
