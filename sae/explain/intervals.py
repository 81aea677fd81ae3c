"""Intervals of 95 %: of shares, of what is composed of shares, of AUCs and of correlations."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

_Z = 1.959964
_RESAMPLES = 1000


class Interval(NamedTuple):
    """A figure and the ends of its interval."""

    value: float
    """The figure."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""


def wilson(n_right: float | int, n: float | int) -> Interval:
    """A share of independent trials by Wilson's score interval (1927); n may be an effective one.

    Raises:
        ValueError: If there are no trials.
    """
    if n <= 0:
        raise ValueError(f"n must be positive, got {n}")
    share = n_right / n
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n)) / (1 + _Z**2 / n)
    return Interval(share, min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share))


def weighted_sum(parts: Sequence[tuple[float, Interval]]) -> Interval:
    """Sum of weight x figure, independent ones, weights >= 0: MOVER (Zou and Donner 2008)."""
    value = math.fsum(weight * part.value for weight, part in parts)
    down = sum((weight * (part.value - part.low)) ** 2 for weight, part in parts)
    up = sum((weight * (part.high - part.value)) ** 2 for weight, part in parts)
    return Interval(value, value - math.sqrt(down), value + math.sqrt(up))


def difference(a: Interval, b: Interval) -> Interval:
    """One independent figure less another; of shares it is Newcombe's interval (1998)."""
    return weighted_sum([(1.0, a), (1.0, Interval(-b.value, -b.high, -b.low))])


def auc(positive: Float64[np.ndarray, " batch"], negative: Float64[np.ndarray, " row"]) -> Interval:
    """Probability that a positive exceeds a negative, ties half; DeLong's variance (1988).

    The interval is Wilson's with the number of trials that this variance is worth.

    Raises:
        ValueError: If one side is empty.
    """
    m, n = len(positive), len(negative)
    if not (m and n):
        raise ValueError(f"positive and negative must both be there, got {m} and {n}")
    order = np.sort(negative)
    below = np.searchsorted(order, positive, "left") + np.searchsorted(order, positive, "right")
    order = np.sort(positive)
    above = 2 * m - np.searchsorted(order, negative, "left")
    above = above - np.searchsorted(order, negative, "right")
    of_positive, of_negative = below / (2 * n), above / (2 * m)
    value = float(of_positive.mean())
    variance = _variance_of_mean(of_positive) + _variance_of_mean(of_negative)
    spread = value * (1 - value)
    worth = min(spread / variance, m + n) if variance > 0 and spread > 0 else min(m, n)
    return wilson(value * worth, worth)


def _variance_of_mean(values: np.ndarray) -> float:
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else 0.25


def correlation(
    predicted: Sequence[Sequence[float]],
    real: Sequence[Sequence[float]],
    *,
    ranks: bool = False,
    seed: int = 0,
) -> Interval | None:
    """Pearson's or Spearman's correlation over the tokens of all windows together.

    The interval is a bootstrap over windows, because tokens of one window are not independent.

    Returns:
        None where either side is constant: the correlation is undefined, not 0.
    """
    lengths = [len(window) for window in real]
    x = np.array([v for window in predicted for v in window], np.float64)
    y = np.array([v for window in real for v in window], np.float64)
    if ranks and len(x):
        x, y = ranked(x), ranked(y)
    whose = np.repeat(np.arange(len(lengths)), lengths)
    terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y])
    sums = np.stack([np.bincount(whose, term, len(lengths)) for term in terms])
    value = float(_pearson(sums.sum(axis=1)))
    if math.isnan(value):
        return None
    picks = np.random.default_rng(seed).integers(0, len(lengths), (_RESAMPLES, len(lengths)))
    resampled = _pearson(sums[:, picks].sum(axis=2))
    known = resampled[np.isfinite(resampled)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (-1.0, 1.0)
    return Interval(value, float(min(low, value)), float(max(high, value)))


def ranked(values: Float64[np.ndarray, " batch"]) -> Float64[np.ndarray, " batch"]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _pearson(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = (n * xx - x * x) * (n * yy - y * y)
        # Rounding leaves a constant a spread of about 1e-16 of its square.
        is_flat = (n * xx - x * x <= 1e-12 * n * xx) | (n * yy - y * y <= 1e-12 * n * yy)
        return np.where(is_flat, np.nan, (n * xy - x * y) / np.sqrt(np.maximum(spread, 1e-300)))
