"""Keep the few best of very many: per group, the entries with the smallest priority."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float16, Float32, Float64, Int64, UInt64

_MERGE_AT = 1 << 17


class WindowRows(NamedTuple):
    """Windows of latents, one per row."""

    group: Int64[np.ndarray, " row"]
    """Which selection the row competes in."""
    priority: Float64[np.ndarray, " row"]
    """The smallest win."""
    window: Int64[np.ndarray, " row"]
    """Number of the window: example x windows per example + place."""
    peak: Float32[np.ndarray, " row"]
    """Largest activation in it."""
    acts: Float16[np.ndarray, "row pos"]
    """All its activations, in shares of the peak."""

    def take(self, index: np.ndarray) -> "WindowRows":
        """Some of the rows."""
        return WindowRows(*(array[index] for array in self))


class Kept:
    """The k rows of smallest priority of every group; memory does not grow with what was offered.

    What is kept does not depend on the order of the offers, nor on how they were cut, as long as
    priorities within a group differ.
    """

    def __init__(self, k: Int64[np.ndarray, " batch"], width: int) -> None:
        """Start empty.

        Args:
            k: Rows to keep, for each group.
            width: Positions of a window.
        """
        self._k = k
        self._bar = np.where(k > 0, np.inf, -np.inf)
        self.rows = WindowRows(
            np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64), np.empty(0, np.float32),
            np.empty((0, width), np.float16),
        )  # fmt: skip
        self._offered: list[WindowRows] = []
        self._n_offered = 0

    def wanted(self, group: np.ndarray, priority: np.ndarray) -> np.ndarray:
        """Whether rows could still be kept; the others need not be offered."""
        return priority < self._bar[group]

    def offer(self, rows: WindowRows) -> None:
        """Offer rows."""
        self._offered.append(rows)
        self._n_offered += len(rows.group)
        if self._n_offered >= _MERGE_AT:
            self.merge()

    def merge(self) -> None:
        """Decide about all that was offered."""
        together = [self.rows, *self._offered]
        self._offered, self._n_offered = [], 0
        rows = WindowRows(*(np.concatenate(parts) for parts in zip(*together, strict=True)))
        order = np.lexsort((rows.priority, rows.group))
        group = rows.group[order]
        first = np.searchsorted(group, group)
        rank = np.arange(len(group)) - first
        self.rows = rows.take(order[rank < self._k[group]])
        is_last = np.flatnonzero(rank == self._k[group] - 1)
        self._bar[group[is_last]] = rows.priority[order[is_last]]

    def restore(self, rows: WindowRows) -> None:
        """Go on from rows that were kept."""
        self.offer(rows)
        self.merge()


def mixed(number: Int64[np.ndarray, " row"], salt: int) -> UInt64[np.ndarray, " row"]:
    """A 64-bit hash of whole numbers: splitmix64's finaliser (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = number.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform(hashed: UInt64[np.ndarray, " row"]) -> Float64[np.ndarray, " row"]:
    """A hash as a number in [0, 1)."""
    return (hashed >> np.uint64(11)).astype(np.float64) / 2.0**53
