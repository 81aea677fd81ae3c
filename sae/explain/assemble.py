"""From the state of the pass to the windows of each latent, and how often it fires.

Windows as arrays, and what they become: Window objects, or columns of a table.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Float32, Float64, Int64
from scipy import sparse

from activations_cache.tokens import table_of
from sae.explain.reservoir import N_BINS, SPLITS, State, WindowRows, half_octave, mixed, uniform
from sae.explain.windows import LatentWindows, Source, Window
from sae.statistics import Interval, wilson

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
    step: Int64[np.ndarray, " row"]
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
            strings: `activations_cache.Pieces`, or what stands for each id everywhere; None where
                positions are patches.
            width: Positions of a window.
        """
        self.tokens, self.width = tokens, width
        self.per_example = -(-tokens.shape[1] // width)
        self._pieces = None if strings is None else table_of(tokens, strings)
        names = () if self._pieces is None else self._pieces.names
        self._strings = np.array([*names, ""], object)
        self._arrow = pa.array(self._strings.tolist(), pa.string())

    def ids(self, window: Int64[np.ndarray, " row"]) -> Int64[np.ndarray, "row pos"]:
        """Token ids of windows; -1 for padding, -2 beyond the end of the example."""
        return self._at(window, self.tokens)

    def _at(self, window: np.ndarray, values: np.ndarray) -> np.ndarray:
        example, place = np.divmod(window, self.per_example)
        position = place[:, None] * self.width + np.arange(self.width)
        last = values.shape[1] - 1
        return np.where(position <= last, values[example[:, None], np.minimum(position, last)], -2)

    def windows(self, cuts: Cuts) -> Iterator[Window]:
        """As objects."""
        length, names, values = self._cut(cuts)
        for row, n in enumerate(length.tolist()):
            example, place = divmod(int(cuts.window[row]), self.per_example)
            tokens = tuple(self._strings[names[row, :n]].tolist())
            acts = tuple(values[row, :n].tolist())
            source, step = SOURCES[cuts.source[row]], int(cuts.step[row])
            p = float(cuts.inclusion[row])
            yield Window(example, place * self.width, tokens, acts, source, step, p)

    def columns(self, cuts: Cuts) -> dict[str, pa.Array]:
        """As columns; the same content."""
        length, names, values = self._cut(cuts)
        example, place = np.divmod(cuts.window, self.per_example)
        inside = np.arange(self.width) < length[:, None]
        ends = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
        tokens = self._arrow.take(pa.array(names[inside]))
        return {
            "source": pa.array(SOURCES).take(pa.array(cuts.source)),
            "bucket": pa.array(cuts.step.astype(np.int16)),
            "inclusion": pa.array(cuts.inclusion),
            "example": pa.array(example),
            "start": pa.array((place * self.width).astype(np.int32)),
            "tokens": pa.ListArray.from_arrays(ends, tokens),
            "activations": pa.ListArray.from_arrays(ends, values[inside].astype(np.float32)),
        }

    def _cut(self, cuts: Cuts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Length of each window, its strings' places, its activations."""
        ids = self.ids(cuts.window)
        length = (ids >= (-1 if self._pieces is None else 0)).sum(axis=1)
        names = np.zeros_like(ids)
        if self._pieces is not None:
            names = self._at(cuts.window, self._pieces.ids)
        return length, names, cuts.acts.astype(np.float64) * cuts.peak[:, None].astype(np.float64)


@dataclass(frozen=True)
class Neighbours:
    """Which latents fire in the same rows of the pool, by Jaccard's index."""

    latent: Int64[np.ndarray, "d_sae k"]
    """The closest ones first; -1 where there are no more."""
    jaccard: Float64[np.ndarray, "d_sae k"]
    """Rows in which both fire / rows in which one does."""


@dataclass(frozen=True)
class _Active:
    """The kept windows of one latent and split, without those that are there twice."""

    window: np.ndarray
    peak: np.ndarray
    acts: np.ndarray
    is_top: np.ndarray

    def cuts(self, index: np.ndarray, source: Source, step: np.ndarray, p: np.ndarray) -> Cuts:
        """Some of them, as what they are taken for."""
        origin = np.full(len(index), SOURCES.index(source))
        return Cuts(self.window[index], self.peak[index], self.acts[index], origin, step, p)


class Assembler:
    """Makes the windows of one latent at a time."""

    def __init__(
        self, state: State, tokens: Int64[np.ndarray, "example pos"], strings: Sequence[str] | None
    ) -> None:
        """Index the pool.

        Args:
            state: What the pass left.
            tokens: The texts of the cache.
            strings: `activations_cache.Pieces`, or what stands for each id everywhere; None where
                positions are patches.
        """
        self._state, self._tokens, self._has_strings = state, tokens, strings is not None
        self.texts = Texts(tokens, strings, state.width)
        self._n_strings = len(strings) if strings is not None else int(tokens.max()) + 1
        self._rows: WindowRows = state.reservoir.rows
        self._start = np.searchsorted(
            self._rows.group, np.arange(state.d_sae * len(SPLITS) + 1) * (N_BINS + 1)
        )
        self._fires = [self._firing_windows(split) for split in range(len(SPLITS))]
        self._holds = [self._token_windows(split) for split in range(len(SPLITS))]
        self.neighbours = self._neighbours()

    def of(self, latent: int) -> LatentWindows:
        """Everything about one latent."""
        splits = [tuple(self.texts.windows(cuts)) for cuts in self.cuts(latent)]
        largest = float(self._state.counts["max_activation"][latent])
        return LatentWindows(latent, largest, self.density(latent).value, splits[0], splits[1])

    def density(self, latent: int) -> Interval:
        """Share of rows on which it fires; the interval allows for bursts within examples."""
        counts, n = self._state.counts, self._state.n_done
        share = counts["n_fired"][latent] / n
        spread = counts["square_fired"][latent] - 2 * share * counts["fired_by_length"][latent]
        variance = (spread + share**2 * counts["square_length"][0]) / n**2
        worth = share * (1 - share) / variance if variance > 0 and 0 < share < 1 else n
        worth = min(max(float(worth), 1.0), float(n))
        return wilson(float(share * worth), worth)

    def cuts(self, latent: int) -> list[Cuts]:
        """Its windows in each split, as arrays."""
        active = [self._active(latent, split) for split in range(len(SPLITS))]
        at_peaks = self._peak_tokens(active[0])
        return [
            Cuts.joined([
                *self._stratified(latent, split, active[split]),
                *self._silent(latent, split, at_peaks),
            ])
            for split in range(len(SPLITS))
        ]

    def _active(self, latent: int, split: int) -> _Active:
        key = latent * len(SPLITS) + split
        rows = self._rows.take(np.arange(self._start[key], self._start[key + 1]))
        is_top = rows.group % (N_BINS + 1) == N_BINS
        again = ~is_top & np.isin(rows.window, rows.window[is_top])
        order = np.flatnonzero(~again)
        rank = np.where(is_top, -rows.peak, self._hash(rows.window, latent))
        order = order[np.lexsort((rank[order], ~is_top[order]))]
        return _Active(rows.window[order], rows.peak[order], rows.acts[order], is_top[order])

    def _hash(self, window: np.ndarray, latent: int) -> np.ndarray:
        salt = int(mixed(np.array([latent]), self._state.config.seed + 3)[0] >> np.uint64(2))
        return uniform(mixed(window ^ salt, self._state.config.seed + 4))

    def _stratified(self, latent: int, split: int, active: _Active) -> Iterator[Cuts]:
        """The top windows, which are certain, some of each step with their p, weak ones."""
        config = self._state.config
        largest = float(self._state.counts["max_activation"][latent])
        is_weak = active.peak <= config.weak_share * largest
        step = np.ceil(active.peak / max(largest, 1e-30) * config.n_steps).astype(int) - 1
        step = np.clip(step, 0, config.n_steps - 1)
        bins = half_octave(active.peak)
        n_all = self._state.counts["n_windows"][latent, split]
        n_top = np.bincount(bins[active.is_top], minlength=N_BINS)
        n_left = np.bincount(bins[~active.is_top], minlength=N_BINS)
        share_left = n_left / np.maximum(n_all - n_top, 1)
        top = np.flatnonzero(active.is_top & ~is_weak)
        yield active.cuts(top, "active", step[top], np.ones(len(top)))
        for number in range(config.n_steps):
            candidates = np.flatnonzero((step == number) & ~active.is_top & ~is_weak)
            taken = candidates[: config.per_step]
            p = share_left[bins[taken]] * len(taken) / max(len(candidates), 1)
            yield active.cuts(taken, "active", step[taken], np.minimum(p, 1.0))
        weak = np.flatnonzero(is_weak & ~active.is_top)[: config.n_negatives]
        yield active.cuts(weak, "weak", np.full(len(weak), -1), np.ones(len(weak)))

    def _silent(self, latent: int, split: int, at_peaks: np.ndarray) -> Iterator[Cuts]:
        """Windows of the pool in which the latent fires nowhere, from three sources."""
        config, windows = self._state.config, self._state.pool_windows[split]
        silent = np.ones(len(windows), bool)
        fires = self._fires[split]
        silent[fires.indices[fires.indptr[latent] : fires.indptr[latent + 1]]] = False
        order = np.flatnonzero(silent)[np.argsort(self._hash(windows[silent], latent))]
        able_for: dict[Source, np.ndarray] = {
            "lexical": self._lexical(split, at_peaks),
            "similar": self._similar(latent, split),
            "random": np.ones(len(windows), bool),
        }
        for source, able in able_for.items():
            chosen = order[able[order]][: config.n_negatives]
            order = order[~np.isin(order, chosen)]
            yield _Active(
                windows[chosen],
                np.zeros(len(chosen), np.float32),
                np.zeros((len(chosen), self._state.width), np.float16),
                np.zeros(len(chosen), bool),
            ).cuts(np.arange(len(chosen)), source, np.full(len(chosen), -1), np.ones(len(chosen)))

    def _lexical(self, split: int, at_peaks: np.ndarray) -> np.ndarray:
        """Windows that hold one of the tokens at the latent's largest peaks."""
        holds, able = self._holds[split], np.zeros(len(self._state.pool_windows[split]), bool)
        for token in at_peaks:
            able[holds.indices[holds.indptr[token] : holds.indptr[token + 1]]] = True
        return able

    def _peak_tokens(self, active: _Active) -> np.ndarray:
        if not self._has_strings:
            return np.empty(0, np.int64)
        best = np.argsort(-active.peak, kind="stable")[:10]
        example, place = np.divmod(active.window[best], self.texts.per_example)
        position = place * self._state.width + active.acts[best].argmax(axis=1)
        return np.unique(self._tokens[example, position])

    def _similar(self, latent: int, split: int) -> np.ndarray:
        """Windows in which a latent fires that often fires together with this one."""
        fires, able = self._fires[split], np.zeros(len(self._state.pool_windows[split]), bool)
        for other in self.neighbours.latent[latent]:
            if other >= 0:
                able[fires.indices[fires.indptr[other] : fires.indptr[other + 1]]] = True
        return able

    def _firing_windows(self, split: int) -> sparse.csc_array:
        """(window of the pool, latent): where a latent fires."""
        pool, windows = self._state.pool, self._state.pool_windows[split]
        order = np.argsort(windows)
        place = np.searchsorted(windows[order], pool.window)
        place = order[np.minimum(place, len(order) - 1)] if len(order) else place
        here = windows[place] == pool.window if len(order) else np.zeros(len(place), bool)
        cells = (np.ones(here.sum(), bool), (place[here], pool.latent[here]))
        return sparse.csc_array(cells, shape=(len(windows), self._state.d_sae), dtype=bool)

    def _token_windows(self, split: int) -> sparse.csr_array:
        """(token, window of the pool): where a token stands."""
        windows = self._state.pool_windows[split]
        ids = self.texts.ids(windows)
        known = ids >= 0
        which = np.broadcast_to(np.arange(len(windows))[:, None], ids.shape)
        cells = (np.ones(known.sum(), np.int32), (ids[known], which[known]))
        return sparse.csr_array(cells, shape=(max(self._n_strings, 1), len(windows)))

    def _neighbours(self) -> Neighbours:
        state, k = self._state, self._state.config.n_neighbours
        pool = state.pool
        explain = np.isin(pool.window, state.pool_windows[0])
        row = pool.window[explain] * state.width + pool.offset[explain]
        _, row = np.unique(row, return_inverse=True)
        cells = (np.ones(len(row), np.float32), (row, pool.latent[explain]))
        fires = sparse.csc_array(cells, shape=(len(np.unique(row)), state.d_sae))
        count = np.asarray(fires.sum(axis=0)).ravel()
        latents, jaccards = np.full((state.d_sae, k), -1), np.zeros((state.d_sae, k))
        both = (fires.T @ fires).tocsr()
        for latent in np.flatnonzero(count):
            part = slice(both.indptr[latent], both.indptr[latent + 1])
            other, n = both.indices[part], both.data[part]
            jaccard = np.where(other == latent, 0.0, n / (count[latent] + count[other] - n))
            best = np.lexsort((other, -jaccard))[:k]
            best = best[jaccard[best] > 0]
            latents[latent, : len(best)], jaccards[latent, : len(best)] = other[best], jaccard[best]
        return Neighbours(latents, jaccards)


def histogram(state: State, latent: int) -> dict[str, list[float]]:
    """Counts of the latent's activations by half octave, with the lower edge of each."""
    counts = state.counts["histogram"][latent]
    used = np.flatnonzero(counts)
    edges = [math.pow(2.0, (int(index) - N_BINS // 2) / 2) for index in used]
    return {"low": edges, "count": counts[used].astype(float).tolist()}
