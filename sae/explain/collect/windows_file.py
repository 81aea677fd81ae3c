"""The files of the pass: windows.parquet and activity.parquet, sorted by latent."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activations_cache import seals
from activations_cache.checks import MonosemaError, Progress, silent
from sae.explain.collect.assemble import Assembler, Cuts, histogram
from sae.explain.collect.state import SPLITS, State
from sae.explain.tables import WRITING, whole_parquet
from sae.explain.windows import LatentWindows, Window

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
            windows[row.pop("split")].append(Window(tokens=tokens, activations=acts, **row))
        known = activity[0]
        explain, score = (tuple(windows[split]) for split in SPLITS)
        largest, density = known["max_activation"], known["density"]
        yield LatentWindows(latent, largest, density, explain, score)


def _read(path: Path, schema: pa.Schema, latent: int) -> list[dict]:
    whole_parquet(path)
    found = pq.read_schema(path)
    if not found.equals(schema):
        raise MonosemaError(
            f"columns of {path} must be {schema.names}, got {found.names}; run `sae explain` again"
        )
    only = [("latent", "==", latent)]
    return pq.read_table(path, filters=only, page_checksum_verification=True).to_pylist()
