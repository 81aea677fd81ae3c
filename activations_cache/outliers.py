"""Rows that are far larger than the others, and a cache without them.

A few rows of a hundred times the norm hold most of the sum of squares: attention sinks at tokens
that nobody expects. They take the scale of all inputs and the direction of every step. So a
training run looks at the norms first, and leaves such rows out.
"""

import logging
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from activations_cache.config import SPLITS, TRAINING_SPLITS
from activations_cache.reader import ActivationCache, HookRows

LARGEST = 0.001
"""The share of the rows whose weight in the sum of squares is looked at."""
WEIGHTY = 0.05
"""From this share on they decide what a dictionary learns; rows alike hold 0.001."""
_ROWS_AT_ONCE = 1 << 20
_log = logging.getLogger(__name__)


class KeptRows(HookRows):
    """The rows of a hook point, whose mean and norm are those of the rows that are kept."""

    def __init__(
        self, rows: HookRows, kept: Int64[Tensor, " kept"], left_out: Int64[Tensor, " row"]
    ):
        vars(self).update({name: v for name, v in vars(rows).items() if name != "mean"})
        self._all, self._kept, self._left_out = rows, kept, left_out

    @cached_property
    def mean(self) -> Float[Tensor, " d_model"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The mean of the kept training rows, float32."""
        n_left_out = len(self._left_out)
        total = self._all.mean.double() * (len(self._kept) + n_left_out)
        for part in self._left_out.split(_ROWS_AT_ONCE // max(self.d_model, 1) + 1):
            total -= self._all[part].double().sum(dim=0)
        return (total / max(len(self._kept), 1)).float()

    @cached_property
    def mean_square_norm(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
        """The mean of the squared norms of the kept training rows."""
        parts = self._kept.split(_ROWS_AT_ONCE)
        total = sum(float(self._all.norms(part).double().square().sum()) for part in parts)
        return total / max(len(self._kept), 1)


class BoundedCache(ActivationCache):
    """A cache without the rows that are larger than a limit; made by `bounded`."""

    def __init__(self, cache: ActivationCache, limits: dict[str, float]) -> None:
        vars(self).update(vars(cache))
        self._rows_of, self._whole, self.limits = {}, cache, limits
        every = cache.rows(TRAINING_SPLITS)
        kept = self.rows(TRAINING_SPLITS)
        left_out = every[~torch.isin(every, kept)]
        self.n_left_out = len(left_out)
        """Rows of explain and score that are left out."""
        self._hooks = {name: KeptRows(rows, kept, left_out) for name, rows in cache._hooks.items()}

    def rows(self, splits: Sequence[str] = SPLITS) -> Int64[Tensor, " row"]:
        """Return the numbers of the kept rows of the named splits, ascending."""
        key = tuple(splits)
        if key not in self._rows_of:
            parts = self._whole.rows(splits).split(_ROWS_AT_ONCE)
            self._rows_of[key] = torch.cat([part[self._is_kept(part)] for part in parts])
        return self._rows_of[key]

    def _is_kept(self, rows: Int64[Tensor, " row"]) -> Bool[Tensor, " row"]:
        kept = torch.ones(len(rows), dtype=torch.bool)
        for name, limit in self.limits.items():
            kept &= self._whole[name].norms(rows) <= limit
        return kept


def bounded(
    cache: ActivationCache, hook_points: Sequence[str], times_median: float
) -> ActivationCache:
    """Return the cache without rows larger than so many times the median row.

    Args:
        cache: The cache; it is returned as it is where no row is so large.
        hook_points: Those at which a row may not be so large.
        times_median: The limit, over the median norm of the training rows.
    """
    found = limits(cache, hook_points, times_median)
    largest = {name: cache[name].statistics.norm_quantiles["1"] for name in found}
    found = {name: limit for name, limit in found.items() if largest[name] > limit}
    return BoundedCache(cache, found) if found else cache


def limits(
    cache: ActivationCache, hook_points: Sequence[str], times_median: float
) -> dict[str, float]:
    """Return so many times the median norm of the training rows, by hook point if it is not 0."""
    medians = {name: cache[name].statistics.norm_quantiles["0.5"] for name in hook_points}
    return {name: times_median * median for name, median in medians.items() if median > 0}


def within(
    cache: ActivationCache, hook_points: Sequence[str], times_median: float | None
) -> ActivationCache:
    """Return the cache without rows of any split above the limit that held in a training.

    It is returned as it is where no row of any split is so large.
    """
    if times_median is None:
        return cache
    found, hold = limits(cache, hook_points, times_median), cache.rows(("hold",))
    found = {
        name: limit
        for name, limit in found.items()
        if cache[name].statistics.norm_quantiles["1"] > limit
        or bool((cache[name].norms(hold) > limit).any())
    }
    return BoundedCache(cache, found) if found else cache


def looked_at(
    cache: ActivationCache, hook_points: Sequence[str], times_median: float | None
) -> ActivationCache:
    """Say how much the largest rows weigh, and return the cache without those that are too large.

    Args:
        cache: The cache; what is no cache on a disk is returned as it is.
        hook_points: Those that are read or predicted.
        times_median: The limit, over the median norm of the training rows; None for no limit.
    """
    if not isinstance(cache, ActivationCache):
        return cache
    kept = cache if times_median is None else bounded(cache, hook_points, times_median)
    for name in hook_points:
        share = share_of_largest(cache, name)
        if isinstance(kept, BoundedCache):
            n, limit = kept.n_left_out, f"{times_median:g} times the median norm"
            advice = f"{n:,} rows above {limit} are left out; train.max_norm: null keeps them"
        elif share > WEIGHTY and times_median is not None:
            advice = "none is above train.max_norm; a lower limit leaves them out"
        elif share > WEIGHTY:
            advice = "train.max_norm: 10 leaves them out"
        else:
            advice = "nothing to do"
        level = logging.WARNING if share > WEIGHTY else logging.INFO
        what = "the largest 0.1 %% of the rows hold %.1f %% of the sum of squares; %s"
        _log.log(level, f"%s: {what}", name, 100 * share, advice)
    return kept


def share_of_largest(cache: ActivationCache, hook_point: str) -> float:
    """Return the share of the sum of squares that the largest 0.1 % of the training rows hold."""
    rows = cache.rows(TRAINING_SPLITS)
    parts = [cache[hook_point].norms(part).numpy() for part in rows.split(_ROWS_AT_ONCE)]
    square = np.concatenate(parts).astype(np.float64) ** 2
    n = max(1, round(LARGEST * len(square)))
    total = float(square.sum())
    return float(np.partition(square, -n)[-n:].sum()) / total if total else 0.0
