"""Windows as arrays, and what they become: Window objects, or columns of a table."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, get_args

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Float32, Float64, Int64

from sae.explain.windows import Source, Window

SOURCES: tuple[Source, ...] = get_args(Source)
"""What `Cuts.source` indexes."""


class Cuts(NamedTuple):
    """Windows of one latent and split."""

    window: Int64[np.ndarray, " row"]
    """Number of the window: example x windows per example + place."""
    peak: Float32[np.ndarray, " row"]
    """Largest activation; 0 for a silent window."""
    acts: Float16[np.ndarray, "row pos"]
    """All activations, in shares of the peak."""
    source: Int64[np.ndarray, " row"]
    """Index into SOURCES."""
    bucket: Int64[np.ndarray, " row"]
    """Step of the peak; -1 for negatives."""
    inclusion: Float64[np.ndarray, " row"]
    """Probability with which a window of its stratum was taken."""

    @staticmethod
    def joined(parts: Sequence["Cuts"]) -> "Cuts":
        """One after the other."""
        return Cuts(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class Texts:
    """The texts of a cache, cut into windows."""

    def __init__(
        self, tokens: Int64[np.ndarray, "example pos"], strings: Sequence[str] | None, width: int
    ) -> None:
        """Keep them.

        Args:
            tokens: Token ids; -1 where an example has ended.
            strings: Each token as text; None where positions are patches.
            width: Positions of a window.
        """
        self.tokens, self.width = tokens, width
        self.per_example = -(-tokens.shape[1] // width)
        self._is_text = strings is not None
        self._strings = np.array([*strings, ""] if strings is not None else [""], object)
        self._arrow = pa.array(self._strings.tolist(), pa.string())

    def ids(self, window: Int64[np.ndarray, " row"]) -> Int64[np.ndarray, "row pos"]:
        """Token ids of windows; -1 for padding, -2 beyond the end of the example."""
        example, place = np.divmod(window, self.per_example)
        position = place[:, None] * self.width + np.arange(self.width)
        last = self.tokens.shape[1] - 1
        ids = self.tokens[example[:, None], np.minimum(position, last)]
        return np.where(position <= last, ids, -2)

    def windows(self, cuts: Cuts) -> Iterator[Window]:
        """As objects."""
        length, names, values = self._cut(cuts)
        for row, n in enumerate(length.tolist()):
            example, place = divmod(int(cuts.window[row]), self.per_example)
            tokens = tuple(self._strings[names[row, :n]].tolist())
            acts = tuple(values[row, :n].tolist())
            source, bucket = SOURCES[cuts.source[row]], int(cuts.bucket[row])
            p = float(cuts.inclusion[row])
            yield Window(example, place * self.width, tokens, acts, source, bucket, p)

    def columns(self, cuts: Cuts) -> dict[str, pa.Array]:
        """As columns; the same content."""
        length, names, values = self._cut(cuts)
        example, place = np.divmod(cuts.window, self.per_example)
        inside = np.arange(self.width) < length[:, None]
        ends = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
        tokens = self._arrow.take(pa.array(names[inside]))
        return {
            "source": pa.array(SOURCES).take(pa.array(cuts.source)),
            "bucket": pa.array(cuts.bucket.astype(np.int16)),
            "inclusion": pa.array(cuts.inclusion),
            "example": pa.array(example),
            "start": pa.array((place * self.width).astype(np.int32)),
            "tokens": pa.ListArray.from_arrays(ends, tokens),
            "activations": pa.ListArray.from_arrays(ends, values[inside].astype(np.float32)),
        }

    def _cut(self, cuts: Cuts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Length of each window, its strings' places, its activations."""
        ids = self.ids(cuts.window)
        length = (ids >= (0 if self._is_text else -1)).sum(axis=1)
        names = ids if self._is_text else np.zeros_like(ids)
        return length, names, cuts.acts.astype(np.float64) * cuts.peak[:, None].astype(np.float64)
