"""The map of a dictionary, written: atlas.parquet, a row per latent, and atlas.json."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from activations_cache import seals
from activations_cache.checks import Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.explain.atlas.completeness import completeness
from sae.explain.atlas.neighbours import CAUTION, MaxCorrelation
from sae.explain.atlas.plane import plane
from sae.explain.config import AtlasConfig, Kind
from sae.explain.labels import Labels
from sae.explain.tables import WRITING, as_json
from sae.explain.text_at_rows import Cache
from sae.explain.windows import shuffled
from sae.neighbours import Nearest, Splitting, nearest, splitting

ATLAS, SUMMARY = "atlas.parquet", "atlas.json"
SINGLES_OUT = 0.5
"""A latent singles a word out if it fires on at least this share of its rows, and at least this
share of its firings are on it."""

_CELLS = 1 << 24  # activations held at once
_TENTHS = 10
_LARGEST = 1 << 28  # latents x units that are correlated

SCHEMA = pa.schema({
    "latent": pa.int32(), "x": pa.float32(), "y": pa.float32(),
    "neighbours": pa.list_(pa.int32()), "cosines": pa.list_(pa.float32()),
    "max_correlation": pa.float32(), "parent": pa.int32(), "parent_cosine": pa.float32(),
})  # fmt: skip


def draw_atlas(
    dictionary: SparseAutoencoder,
    cache: Cache,
    hook_point: str,
    config: AtlasConfig,
    out_dir: Path,
    *,
    narrow: SparseAutoencoder | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Coordinates, neighbours, the largest correlation with the stream's coordinates, parents.

    Args:
        dictionary: Whose latents.
        cache: Its rows.
        hook_point: Which.
        config: How.
        out_dir: Where the files go.
        narrow: A narrower dictionary of the same stream, whose latents are the parents.
        progress: Called after each chunk of rows.

    Returns:
        What atlas.json says.
    """
    rows = dictionary.dec_rows.detach().float().cpu()
    at = plane(rows, config.plane)
    near = nearest(rows, rows, min(config.n_neighbours, len(rows) - 1), own=torch.arange(len(rows)))
    correlation = _correlation(dictionary, cache, hook_point, config.n_rows, progress or silent)
    split = None if narrow is None else splitting(narrow.dec_rows.detach().float().cpu(), rows)
    with seals.replacing(out_dir / ATLAS) as unfinished:
        pq.write_table(_table(at, near, correlation, split), unfinished, **WRITING)
    summary: dict[str, Any] = {"caution": CAUTION, "config": asdict(config)}
    known = correlation[torch.isfinite(correlation)]
    if len(known):
        summary["correlation_with_the_stream"] = {
            "median": float(known.median()),
            "share_at_most_0.3": float((known <= 0.3).float().mean()),
            "n": len(known),
        }
    if split is not None:
        summary["splitting"] = {
            "without_a_parent": int((split.parent < 0).sum()),
            "parents_with_several_children": int((split.n_children > 1).sum()),
            "most_children": int(split.n_children.max()),
        }
    seals.write(out_dir, {SUMMARY: as_json(summary)})
    return summary


def _correlation(
    dictionary: SparseAutoencoder, cache: Cache, hook_point: str, n_rows: int, report: Progress
) -> Float[Tensor, " d_sae"]:
    """Over evenly spread rows; nan for silent latents, and for all where the table is too large."""
    d_sae, d_in = dictionary.enc_rows.shape
    if d_sae * d_in > _LARGEST:
        return torch.full((d_sae,), torch.nan)
    ids = cache.rows(("explain", "score"))
    ids = ids[:: max(1, -(-len(ids) // n_rows))]
    found = MaxCorrelation(d_sae, d_in)
    step = max(1, _CELLS // d_sae)
    for first in range(0, len(ids), step):
        x = cache[hook_point][ids[first : first + step]]
        with torch.no_grad():
            found.update(dictionary.encode_dense(x.to(dictionary.enc_rows.device)).cpu(), x.cpu())
        report(min(first + step, len(ids)), len(ids), "rows correlated")
    return found.compute()


def _table(
    at: Float[Tensor, "d_sae 2"],
    near: Nearest,
    correlation: Float[Tensor, " d_sae"],
    split: Splitting | None,
) -> pa.Table:
    none = pa.nulls(len(at))
    columns = {
        "latent": range(len(at)),
        "x": at[:, 0].numpy(),
        "y": at[:, 1].numpy(),
        "neighbours": near.latent.tolist(),
        "cosines": near.cosine.tolist(),
        "max_correlation": pa.array(correlation.numpy(), from_pandas=True),
        "parent": none if split is None else split.parent.numpy(),
        "parent_cosine": none if split is None else split.cosine.numpy(),
    }
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def words_with_a_latent(
    labels: Labels,
    names: Mapping[Kind, Sequence[str]],
    values: Int32[np.ndarray, " row"],
    n_fired: Int64[np.ndarray, " d_sae"],
    n_alive: int,
    config: AtlasConfig,
) -> dict[str, Any]:
    """Fit whether a word has a latent that singles it out against how frequent the word is.

    Args:
        labels: Of all latents.
        names: What their values are called.
        values: The word of each row of the explain split.
        n_fired: Rows of the explain split on which each latent fires.
        n_alive: Live latents.
        config: How many words.

    Returns:
        The fit, or the reason why there is none.
    """
    kind = labels.kinds.index("word") if "word" in labels.kinds else -1
    of_words = labels.rules.kind == kind
    share = labels.rules.weight >= SINGLES_OUT
    is_most = labels.joint >= SINGLES_OUT * np.maximum(n_fired, 1)[:, None]
    found = of_words[:, None] & share & is_most
    present = set(labels.rules.value[found].tolist()) - {-1}
    count = np.bincount(values[values >= 0], minlength=1)
    able = [word for word in np.flatnonzero(count >= 5).tolist() if names["word"][word].isalpha()]
    words = np.array(shuffled(able, "concepts")[: config.n_concepts], np.int64)
    has = np.array([int(word) in present for word in words], bool)
    points = _points(count[words] / len(values), has)
    try:
        fit = completeness(count[words] / len(values), has, n_alive)
    except ValueError as error:
        return {"reason": str(error), "n": len(words), "points": points}
    return {**fit._asdict(), "points": points}


def _points(frequency: np.ndarray, has: np.ndarray) -> list[list[float]]:
    """Frequency, share with a latent and number of the words of each tenth by frequency."""
    order = np.argsort(frequency, kind="stable")
    return [
        [float(np.exp(np.log(frequency[part]).mean())), float(has[part].mean()), float(len(part))]
        for part in np.array_split(order, _TENTHS)
        if len(part)
    ]
