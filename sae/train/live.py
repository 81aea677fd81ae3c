"""Training without a cache of its rows: the model's forward feeds the steps.

A small cache comes first. Its statistics give the scale and the first weights, and it is what
dictionaries are measured and explained on. The rows that the steps see are those of other
examples, none of them held out, and no file has them.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activations_cache.config import TRAINING_SPLITS, CacheConfig
from activations_cache.layout import STORAGE, has_scale
from activations_cache.shared_text import forget
from activations_cache.summary import limits
from monosema.checks import MonosemaError, Progress, at_least
from sae.config import from_dict
from sae.train.config import TrainConfig
from sae.train.cost import free_on_cpu
from sae.train.ranks import Ranks

if TYPE_CHECKING:
    from activations_cache import ActivationCache, ActivationStream

MIB = 1 << 20

_log = logging.getLogger(__name__)


def live_rows(
    cache: "ActivationCache",
    config: TrainConfig,
    hook_points: Sequence[str],
    place: Path,
    ranks: Ranks,
    progress: Progress,
) -> "ActivationStream":
    """Return the rows that a model gives beside a cache, as batches.

    Args:
        cache: The small cache; it says which model, which data and which hook points.
        config: How many rows, and how many of them are in memory.
        hook_points: Those that are read or predicted.
        place: Directory where several processes keep the text while they read it.
        ranks: The processes that share the examples.
        progress: Called while the model is loaded, the text is packed and the buffer is filled.

    Raises:
        MonosemaError: If nothing is held out, the cache names no model, the buffer is larger than
            the memory that is free, or the data are too short.
    """
    from activations_cache.live import ActivationStream, stream_beside

    made_by = require_live(cache)
    require_buffer(config.buffer_rows, row_bytes(cache, hook_points))
    least = 2 * made_by.contexts_per_forward * cache.manifest.plan.rows_per_example
    at_least("train.buffer_rows", config.buffer_rows, least)  # before a model is loaded
    n_known = len(cache.rows(TRAINING_SPLITS))
    assert config.n_rows is not None, "the config was checked"
    wanted = replace(made_by, n_rows=n_known + config.n_rows)
    several = ranks.world.size > 1
    source = stream_beside(cache, wanted, place if several else None, progress)
    ranks.require_same(source.plan.n_examples, "the number of examples")  # and all have read them
    if several and ranks.is_first:
        forget(place)
    return ActivationStream(
        source,
        made_by.contexts_per_forward,
        buffer_rows=config.buffer_rows,
        limits={} if config.max_norm is None else limits(cache, hook_points, config.max_norm),
        share=(ranks.rows.rank, ranks.rows.size),
        n_rows=config.n_rows,
        progress=progress if ranks.is_first else lambda *_: None,
    )


def require_live(cache: "ActivationCache") -> CacheConfig:
    """Return what a cache was made from, if a model can go on from there.

    Raises:
        MonosemaError: If it holds nothing out, or names no model.
    """
    if not len(cache.rows(("hold",))):
        raise MonosemaError(
            f"{cache.path} must hold documents out beside train.source 'live', got none; set hold "
            "of the cache's text or images above 0"
        )
    recorded = cache.manifest.plan.request.get("config", {})
    if not recorded.get("model"):
        raise MonosemaError(
            f"{cache.path} must name its model beside train.source 'live', got a cache without; "
            "train.source: cache trains on its rows"
        )
    return from_dict(CacheConfig, recorded, str(cache.path))


def row_bytes(cache: "ActivationCache", hook_points: Sequence[str]) -> int:
    """Return the bytes of a row in the buffer: all its hook points, in the cache's dtype."""
    dtype = cache.manifest.plan.dtype
    size = 4 if has_scale(dtype) else STORAGE[dtype][0].itemsize
    return size * sum(map(cache.d_model, hook_points))


def require_buffer(n_rows: int, bytes_of_row: int) -> None:
    """Say what the buffer takes, and refuse one that is larger than the memory that is free.

    Raises:
        MonosemaError: If it is; it names both.
    """
    needed, free = n_rows * bytes_of_row, free_on_cpu()
    if needed > free:
        raise MonosemaError(
            f"train.buffer_rows must fit into memory, {free / 2**30:,.1f} GiB free, got "
            f"{n_rows:,} rows that need {needed / 2**30:,.1f} GiB; lower it"
        )
    _log.info("the buffer of %s rows takes %.1f MiB", f"{n_rows:,}", needed / MIB)


def record_of(stream: "ActivationStream", config: TrainConfig, ranks: Ranks) -> Mapping[str, Any]:
    """Return what the rows of a live run depend on, beside the cache: it is part of the identity.

    Each process reads its own examples, so their number is part of it, unlike in a run from a
    cache.
    """
    return {
        "rows": stream.fingerprint,
        "buffer_rows": config.buffer_rows,
        "processes": ranks.rows.size,
    }
