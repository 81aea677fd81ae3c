"""The texts in which a latent fires most, and how strong its firings are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from activations_cache.tokens import PieceTable
from sae.explain.config import ExplainConfig
from sae.explain.firings import Codes
from sae.explain.text_at_rows import CachedTexts, RowText

N_FIFTHS = 5
"""Steps from 0 to a latent's largest activation, from each of which contexts are shown."""


@dataclass(frozen=True)
class SplitFirings:
    """What the latents do on the rows of one split."""

    split: str
    """Name of the split."""
    codes: Codes
    """Firings on its rows."""
    text: RowText
    """The text at its rows."""


@dataclass(frozen=True)
class Context:
    """A piece of text around one of the largest activations of a latent."""

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
        order = np.argsort(-peaks, kind="stable")
        for rank, run in enumerate(self._chosen(order, peaks[order])):
            inside = _LatentFirings(*(array[starts[run] : ends[run]] for array in fired))
            yield self._context(latent, rank, inside)

    def _chosen(self, order: np.ndarray, peaks: np.ndarray) -> np.ndarray:
        """The contexts with the largest peaks, then some of each fifth, spread evenly over it."""
        n_top, n_each = self._config.top_contexts, self._config.bucket_contexts
        rest, fifth = order[n_top:], np.ceil(peaks[n_top:] / peaks[0] * N_FIFTHS)
        chosen = [order[:n_top]]
        for lower in range(N_FIFTHS, 0, -1):
            inside = rest[fifth == lower]
            n = min(n_each, len(inside))
            places = np.arange(n) * len(inside) // max(n, 1)
            chosen.append(inside[places])
        return np.concatenate(chosen)

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
    density: Float32[np.ndarray, " d_sae"]
    """The same as a share of all rows."""
    max_activation: Float32[np.ndarray, " d_sae"]
    """Largest activation; 0 for a dead latent."""
    histogram: Int32[np.ndarray, "d_sae bin"]
    """Counts of activations in equal steps from 0 to the largest; silent rows are left out."""


def activity(parts: Sequence[SplitFirings], n_bins: int) -> Activity:
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
