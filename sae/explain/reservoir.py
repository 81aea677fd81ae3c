"""What the pass remembers between chunks: counts, windows, the pool; it can be saved.

A reservoir holds the few best of very many: per group, the entries with the smallest priority.
"""

import json
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float16, Float32, Float64, Int64, UInt64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from activations_cache import seals
from activations_cache.checks import DamagedFileError
from sae.explain.config import WindowConfig

_log = logging.getLogger(__name__)

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


class Reservoir:
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
        joined = [self.rows, *self._offered]
        self._offered, self._n_offered = [], 0
        rows = WindowRows(*(np.concatenate(parts) for parts in zip(*joined, strict=True)))
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


N_BINS = 64
"""Half octaves of activation, from 2^-16 to 2^16."""

SPLITS = ("explain", "score")
"""Those that are collected; hold is never looked at."""


def half_octave(values: Float32[np.ndarray, " row"]) -> Int64[np.ndarray, " row"]:
    """Index of the half octave in which an activation lies; both ends take what is beyond."""
    octave = np.log2(np.maximum(np.abs(values), np.float32(1e-30)))
    return np.clip(np.floor(2 * octave) + N_BINS // 2, 0, N_BINS - 1).astype(np.int64)


class PoolEntries(NamedTuple):
    """Firings inside the windows of the pool."""

    window: Int64[np.ndarray, " entry"]
    """Number of the window."""
    offset: np.ndarray
    """Place in the window, int16."""
    latent: np.ndarray
    """The latent, int32."""
    value: Float32[np.ndarray, " entry"]
    """Its activation."""

    @staticmethod
    def none() -> "PoolEntries":
        """No firings."""
        kinds = (np.int64, np.int16, np.int32, np.float32)
        return PoolEntries(*(np.empty(0, kind) for kind in kinds))


class State:
    """Everything that is known after some chunks; its size is fixed by d_sae and the config."""

    def __init__(self, d_sae: int, width: int, config: WindowConfig) -> None:
        """Start with nothing known."""
        self.d_sae, self.width, self.config = d_sae, width, config
        self.n_done = 0
        """Rows that were encoded."""
        self.counts: dict[str, np.ndarray] = {
            "n_fired": np.zeros(d_sae, np.int64),
            "n_examples": np.zeros(d_sae, np.int64),
            "square_fired": np.zeros(d_sae),  # sum over examples of c^2, c the firings in it
            "fired_by_length": np.zeros(d_sae),  # sum over examples of c n, n the rows of it
            "square_length": np.zeros(1),
            "max_activation": np.zeros(d_sae, np.float32),
            "histogram": np.zeros((d_sae, N_BINS), np.int64),
            "n_windows": np.zeros((d_sae, len(SPLITS), N_BINS), np.int64),
        }
        per_group = np.full(N_BINS + 1, config.per_step + 2)
        per_group[N_BINS] = config.n_top  # the last stratum takes the largest peaks
        self.reservoir = Reservoir(np.tile(per_group, d_sae * len(SPLITS)), width)
        self.pool_windows = [np.empty(0, np.int64) for _ in SPLITS]
        """Windows of the pool of each split, by their hash."""
        self._pool: list[PoolEntries] = [PoolEntries.none()]
        self._n_entered = 0

    def add_to_pool(self, split: int, windows: np.ndarray, entries: PoolEntries) -> None:
        """Let windows compete for the pool of their split by their hash alone."""
        before = self.pool_windows[split]
        joined = np.unique(np.concatenate([before, windows]))
        order = np.argsort(uniform(mixed(joined, self.config.seed)), kind="stable")
        after = joined[order[: self.config.pool]]
        if len(before) == len(after) and np.array_equal(before, after):
            return
        fresh = np.setdiff1d(after, before)
        new = np.isin(entries.window, fresh)
        self._pool.append(PoolEntries(*(array[new] for array in entries)))
        self._n_entered += len(fresh)
        self.pool_windows[split] = after
        if self._n_entered > self.config.pool:  # not for every chunk: it copies the whole pool
            self._settle()

    @property
    def pool(self) -> PoolEntries:
        """Firings inside the windows of the pool, in the order of the rows."""
        self._settle()
        return self._pool[0]

    def _settle(self) -> None:
        """Drop the firings of windows that have left the pool."""
        if len(self._pool) == 1:
            return
        joined = PoolEntries(*(np.concatenate(p) for p in zip(*self._pool, strict=True)))
        stays = np.isin(joined.window, np.concatenate(self.pool_windows))
        self._pool, self._n_entered = [PoolEntries(*(array[stays] for array in joined))], 0

    def save(self, path: Path, identity: dict[str, object]) -> None:
        """Write the state; `load` goes on from it."""
        self.reservoir.merge()
        arrays = {f"count.{name}": array for name, array in self.counts.items()}
        arrays |= {f"kept.{n}": a for n, a in self.reservoir.rows._asdict().items()}
        arrays |= {f"pool.{n}": a for n, a in self.pool._asdict().items()}
        arrays |= {f"windows.{s}": a for s, a in enumerate(self.pool_windows)}
        arrays["n_done"] = np.array([self.n_done], np.int64)
        with seals.replacing(path) as unfinished:
            save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, unfinished,
                      {"identity": json.dumps(identity, sort_keys=True)})  # fmt: skip

    def load(self, path: Path, identity: dict[str, object]) -> bool:
        """Go on from a saved state of the same identity; False if there is none that is whole."""
        if not path.is_file():
            return False
        try:
            seals.require_whole(path)
            is_of_ours = _identity(path) == json.dumps(identity, sort_keys=True)
        except (DamagedFileError, SafetensorError) as error:
            _log.warning("%s; the pass begins anew", error)
            return False
        if not is_of_ours:
            return False
        arrays = load_file(path)
        for name in self.counts:
            self.counts[name] = arrays[f"count.{name}"]
        self.reservoir.restore(WindowRows(*(arrays[f"kept.{n}"] for n in WindowRows._fields)))
        self._pool = [PoolEntries(*(arrays[f"pool.{n}"] for n in PoolEntries._fields))]
        self.pool_windows = [arrays[f"windows.{s}"] for s in range(len(SPLITS))]
        self.n_done = int(arrays["n_done"][0])
        return True


def _identity(path: Path) -> str:
    with safe_open(path, "numpy") as file:
        return (file.metadata() or {}).get("identity", "")
