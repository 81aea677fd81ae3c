"""The pass: encode every row of the explain and score splits once, and write what is needed.

windows.parquet and activity.parquet are sorted by latent.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int
from torch import Tensor

from activations_cache import seals
from activations_cache.checks import MonosemaError, Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.config import to_dict
from sae.explain.assemble import Assembler, Cuts, histogram
from sae.explain.config import WindowConfig
from sae.explain.firings import ChunkFirings, encode_chunk
from sae.explain.reservoir import (
    N_BINS,
    SPLITS,
    PoolEntries,
    State,
    WindowRows,
    half_octave,
    mixed,
    uniform,
)
from sae.explain.tables import WRITING, whole_parquet
from sae.explain.text_at_rows import Cache
from sae.explain.windows import LatentWindows, Window


class _ChunkRows(NamedTuple):
    """The rows of a chunk, ordered by example and position."""

    ids: Int[Tensor, " row"]
    example: np.ndarray
    window: np.ndarray
    offset: np.ndarray
    split: np.ndarray


class _WindowPeaks(NamedTuple):
    """The windows of a chunk in which a latent fires, ordered by latent, then window."""

    start: np.ndarray  # first firing
    latent: np.ndarray
    window: np.ndarray
    split: np.ndarray
    peak: np.ndarray


def window_width(cache: Cache, config: WindowConfig) -> int:
    """Positions of a window: as configured, or whole examples."""
    longest = cache.examples.tokens.shape[1]
    return min(config.tokens, longest) or longest


def collect(
    dictionary: SparseAutoencoder,
    cache: Cache,
    hook_point: str,
    config: WindowConfig,
    *,
    state_path: Path | None = None,
    identity: dict[str, object] | None = None,
    progress: Progress | None = None,
) -> State:
    """Go over the rows once; every row is encoded exactly once, and hold rows never.

    Args:
        dictionary: What encodes.
        cache: Rows and texts, split by document.
        hook_point: Which rows.
        config: What to keep.
        state_path: Where the state is saved now and then; an interrupted pass goes on from it.
        identity: What must be the same for that: the cache, the dictionary.
        progress: Called after each chunk with the number of rows done.

    Raises:
        ValueError: If a split has no rows, or activations are not finite.
    """
    report = progress or silent
    state = State(dictionary.config.d_sae, window_width(cache, config), config)
    settings = to_dict(config, all_keys=False)
    known: dict[str, object] = {"hook_point": hook_point, **settings, **(identity or {})}
    if state_path is not None:
        state.load(state_path, known)
    rows = _ordered_rows(cache, state.width)
    for number, chunk in enumerate(_chunks(rows, state.n_done, config.rows_per_chunk), 1):
        _add(state, chunk, encode_chunk(dictionary, cache[hook_point], chunk.ids))
        state.n_done += len(chunk.ids)
        if state_path is not None and number % config.save_every == 0:
            state.save(state_path, known)
        report(state.n_done, len(rows.ids), "rows encoded for windows")
    state.reservoir.merge()
    return state


def _ordered_rows(cache: Cache, width: int) -> _ChunkRows:
    parts, splits = [], []
    for number, split in enumerate(SPLITS):
        ids = cache.rows((split,))
        if not len(ids):
            raise MonosemaError(f"split {split!r} must have rows, got none; build a larger cache")
        parts.append(ids)
        splits.append(np.full(len(ids), number, np.int8))
    ids, split = torch.cat(parts), np.concatenate(splits)
    refs = cache.refs(ids)
    example, position = refs.example.numpy(), refs.position.numpy()
    order = np.lexsort((position, example))
    example, position = example[order], position[order]
    per_example = -(-cache.examples.tokens.shape[1] // width)
    window = example * per_example + position // width
    return _ChunkRows(ids[torch.from_numpy(order)], example, window, position % width, split[order])


def _chunks(rows: _ChunkRows, start: int, size: int) -> Iterator[_ChunkRows]:
    """Whole examples, so that no window is cut."""
    while start < len(rows.ids):
        end = min(start + size, len(rows.ids))
        end = int(np.searchsorted(rows.example, rows.example[end - 1], "right"))
        part = slice(start, end)
        yield _ChunkRows(rows.ids[part], *(array[part] for array in rows[1:]))  # pyright: ignore[reportArgumentType]
        start = end


def _add(state: State, rows: _ChunkRows, fired: ChunkFirings) -> None:
    _count(state, rows, fired)
    peaks = _peaks(rows, fired)
    bins = half_octave(peaks.peak)
    group = (peaks.latent * len(SPLITS) + peaks.split) * (N_BINS + 1)
    n_groups = state.d_sae * len(SPLITS) * (N_BINS + 1)
    result = np.bincount(group + bins, minlength=n_groups)
    state.counts["n_windows"] += result.reshape(state.d_sae, len(SPLITS), N_BINS + 1)[..., :N_BINS]
    salt = mixed(peaks.latent, state.config.seed + 1).astype(np.int64)
    by_hash = uniform(mixed(peaks.window ^ salt, state.config.seed + 2))
    for key, priority in ((group + bins, by_hash), (group + N_BINS, -peaks.peak - by_hash * 1e-9)):
        chosen = np.flatnonzero(state.reservoir.wanted(key, priority))
        acts = _acts(chosen, peaks, rows, fired, state.width)
        state.reservoir.offer(
            WindowRows(
                key[chosen], priority[chosen].astype(np.float64), peaks.window[chosen],
                peaks.peak[chosen], acts,
            )
        )  # fmt: skip
    for split in range(len(SPLITS)):
        _pool(state, split, rows, fired)


def _count(state: State, rows: _ChunkRows, fired: ChunkFirings) -> None:
    counts, d_sae = state.counts, state.d_sae
    counts["n_fired"] += np.bincount(fired.latent, minlength=d_sae)
    np.maximum.at(counts["max_activation"], fired.latent, fired.value)
    cell = fired.latent * N_BINS + half_octave(fired.value)
    counts["histogram"] += np.bincount(cell, minlength=d_sae * N_BINS).reshape(d_sae, N_BINS)
    first = rows.example[0]
    length = np.bincount(rows.example - first)
    key = fired.latent * len(length) + (rows.example[fired.row] - first)  # ascends
    start = np.flatnonzero(np.diff(key, prepend=-1))
    n = np.diff(start, append=len(key))
    latent, rows_of = key[start] // len(length), length[key[start] % len(length)]
    counts["n_examples"] += np.bincount(latent, minlength=d_sae)
    counts["square_fired"] += np.bincount(latent, n.astype(float) ** 2, minlength=d_sae)
    counts["fired_by_length"] += np.bincount(latent, n * rows_of, minlength=d_sae)
    counts["square_length"] += float((length.astype(float) ** 2).sum())


def _peaks(rows: _ChunkRows, fired: ChunkFirings) -> _WindowPeaks:
    window = rows.window[fired.row]
    begins = np.ones(len(window), bool)
    begins[1:] = (window[1:] != window[:-1]) | (fired.latent[1:] != fired.latent[:-1])
    start = np.flatnonzero(begins)
    peak = np.maximum.reduceat(fired.value, start) if len(start) else fired.value[:0]
    split = rows.split[fired.row[start]].astype(np.int64)
    return _WindowPeaks(start, fired.latent[start].astype(np.int64), window[start], split, peak)


def _acts(
    chosen: np.ndarray, peaks: _WindowPeaks, rows: _ChunkRows, fired: ChunkFirings, width: int
) -> np.ndarray:
    """Activations of the chosen windows at each position, in shares of the peak."""
    ends = np.append(peaks.start[1:], len(fired.row))
    length = ends[chosen] - peaks.start[chosen]
    place = np.repeat(np.arange(len(chosen)), length)
    inside = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    entry = np.repeat(peaks.start[chosen], length) + inside
    acts = np.zeros((len(chosen), width), np.float16)
    shares = fired.value[entry] / peaks.peak[chosen][place]
    # A weak firing keeps a share above 0: smaller ones than 6e-8 do not exist in half precision.
    acts[place, rows.offset[fired.row[entry]]] = np.maximum(shares, 6e-8)
    return acts


def _pool(state: State, split: int, rows: _ChunkRows, fired: ChunkFirings) -> None:
    windows = np.unique(rows.window[rows.split == split])
    full = state.pool_windows[split]
    if len(full) == state.config.pool:  # whatever hashes beyond the last one cannot enter
        bar = uniform(mixed(full[-1:], state.config.seed))[0]
        windows = windows[uniform(mixed(windows, state.config.seed)) < bar]
    if len(windows):
        inside = np.isin(rows.window[fired.row], windows)
        row = fired.row[inside]
        entries = PoolEntries(
            rows.window[row], rows.offset[row].astype(np.int16),
            fired.latent[inside].astype(np.int32), fired.value[inside],
        )  # fmt: skip
        state.add_to_pool(split, windows, entries)


WINDOWS = "windows.parquet"
ACTIVITY = "activity.parquet"

_PER_GROUP = 64
_WINDOW_SCHEMA = pa.schema({
    "latent": pa.int32(), "split": pa.string(), "source": pa.string(), "bucket": pa.int16(),
    "inclusion": pa.float64(), "example": pa.int64(), "start": pa.int32(),
    "tokens": pa.list_(pa.string()), "activations": pa.list_(pa.float32()),
})  # fmt: skip
_ACTIVITY_SCHEMA = pa.schema({
    "latent": pa.int32(), "n_fired": pa.int64(), "n_examples": pa.int64(),
    "density": pa.float64(), "density_low": pa.float64(), "density_high": pa.float64(),
    "max_activation": pa.float64(), "histogram_low": pa.list_(pa.float64()),
    "histogram_count": pa.list_(pa.float64()), "together": pa.list_(pa.int64()),
    "jaccard": pa.list_(pa.float64()),
})  # fmt: skip


def write_windows(
    directory: Path, state: State, assembler: Assembler, progress: Progress | None = None
) -> None:
    """Write both files, a few latents at a time; each appears when it is whole."""
    report = progress or silent
    tables = (
        (WINDOWS, _WINDOW_SCHEMA, lambda latents: _windows(assembler, latents)),
        (ACTIVITY, _ACTIVITY_SCHEMA, lambda latents: _activities(state, assembler, latents)),
    )
    for name, schema, table_of in tables:
        with (
            seals.replacing(directory / name) as unfinished,
            pq.ParquetWriter(unfinished, schema, **WRITING) as writer,
        ):
            for first in range(0, state.d_sae, _PER_GROUP):
                last = min(first + _PER_GROUP, state.d_sae)
                writer.write_table(table_of(range(first, last)))
                report(last, state.d_sae, f"latents in {name}")


def _windows(assembler: Assembler, latents: range) -> pa.Table:
    cuts = [of_split for latent in latents for of_split in assembler.cuts(latent)]
    n = [len(of_split.window) for of_split in cuts]
    owners = np.repeat(np.array(latents, np.int32), len(SPLITS))
    splits = np.tile(np.arange(len(SPLITS)), len(latents))
    columns = {
        "latent": pa.array(np.repeat(owners, n)),
        "split": pa.array(SPLITS).take(pa.array(np.repeat(splits, n))),
        **assembler.texts.columns(Cuts.joined(cuts)),
    }
    return pa.table(columns, schema=_WINDOW_SCHEMA)


def _activities(state: State, assembler: Assembler, latents: range) -> pa.Table:
    rows = [_activity(state, assembler, latent) for latent in latents]
    return pa.Table.from_pylist(rows, schema=_ACTIVITY_SCHEMA)


def _activity(state: State, assembler: Assembler, latent: int) -> dict:
    density, bins = assembler.density(latent), histogram(state, latent)
    near = assembler.neighbours.latent[latent] >= 0
    return {
        "latent": latent,
        "n_fired": int(state.counts["n_fired"][latent]),
        "n_examples": int(state.counts["n_examples"][latent]),
        "density": density.value,
        "density_low": density.low,
        "density_high": density.high,
        "max_activation": float(state.counts["max_activation"][latent]),
        "histogram_low": bins["low"],
        "histogram_count": bins["count"],
        "together": assembler.neighbours.latent[latent][near].tolist(),
        "jaccard": assembler.neighbours.jaccard[latent][near].tolist(),
    }


def read_windows(directory: Path, latents: Sequence[int]) -> Iterator[LatentWindows]:
    """Read some latents; only the parts of the files that hold them are read.

    Raises:
        FileNotFoundError: If the files are not there.
        ValueError: If their columns are not those of this version, or a latent is not in them.
    """
    for latent in latents:
        activity = _read(directory / ACTIVITY, _ACTIVITY_SCHEMA, latent)
        if not activity:
            raise MonosemaError(f"latent must be in {directory / ACTIVITY}, got {latent}")
        windows: dict[str, list[Window]] = {split: [] for split in SPLITS}
        for row in _read(directory / WINDOWS, _WINDOW_SCHEMA, latent):
            row.pop("latent")
            tokens, acts = tuple(row.pop("tokens")), tuple(row.pop("activations"))
            split, step = row.pop("split"), row.pop("bucket")
            windows[split].append(Window(tokens=tokens, activations=acts, step=step, **row))
        known = activity[0]
        explain, score = (tuple(windows[split]) for split in SPLITS)
        largest, density = known["max_activation"], known["density"]
        yield LatentWindows(latent, largest, density, explain, score)


def _read(path: Path, schema: pa.Schema, latent: int) -> list[dict]:
    whole_parquet(path)
    result = pq.read_schema(path)
    if not result.equals(schema):
        raise MonosemaError(
            f"columns of {path} must be {schema.names}, got {result.names}; run `sae explain` again"
        )
    only = [("latent", "==", latent)]
    return pq.read_table(path, filters=only, page_checksum_verification=True).to_pylist()
