"""Intervals of 95 %: of shares, of what is composed of shares, of AUCs and of correlations.

Bootstrap intervals of means over tokens, where the contexts are what is independent.

Reseed noise: what differences between dictionaries can be told apart from another seed.

Many small computations, each on one core.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy import stats
from threadpoolctl import threadpool_limits
from torch import Tensor

from monosema.checks import MonosemaError

Item = TypeVar("Item")
Result = TypeVar("Result")

Z = 1.959964
"""Half of a 95 % interval in standard errors."""
_RESAMPLES = 1000


class Interval(NamedTuple):
    """A figure and the ends of its interval; nan where they are not defined."""

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
        raise MonosemaError(f"n must be positive, got {n}")
    share = n_right / n
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n * n)) / (1 + Z**2 / n)
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
        raise MonosemaError(f"positive and negative must both be there, got {m} and {n}")
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
        x, y = stats.rankdata(x), stats.rankdata(y)
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


def _pearson(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = (n * xx - x * x) * (n * yy - y * y)
        # Rounding leaves a constant a spread of about 1e-16 of its square.
        is_flat = (n * xx - x * x <= 1e-12 * n * xx) | (n * yy - y * y <= 1e-12 * n * yy)
        return np.where(is_flat, np.nan, (n * xy - x * y) / np.sqrt(np.maximum(spread, 1e-300)))


class Resamples:
    """The same resamples of the contexts for every figure, so that differences are paired."""

    def __init__(self, n_contexts: int, n_resamples: int, seed: int) -> None:
        """Draw `n_resamples` times `n_contexts` contexts with replacement; row 0 has each once."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(n_contexts, (n_resamples, n_contexts), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        self._weights = torch.cat([torch.ones(1, n_contexts, dtype=torch.float64), counts])

    def mean(
        self, sums: Float64[Tensor, " example"], n_tokens: Float64[Tensor, " example"]
    ) -> Float64[Tensor, " batch"]:
        """Mean per token over all contexts, then over each resample.

        Args:
            sums: Sum over the tokens of each context.
            n_tokens: Tokens of each context.
        """
        return (self._weights @ sums) / (self._weights @ n_tokens)


def interval(values: Float[Tensor, " batch"]) -> Interval:
    """The first of the values with the quantiles of the others; nan where nothing is defined."""
    others = values[1:][values[1:].isfinite()]
    if len(others) == 0:
        return Interval(value=float(values[0]), low=math.nan, high=math.nan)
    low, high = torch.quantile(others, torch.tensor([0.025, 0.975], dtype=others.dtype)).tolist()
    return Interval(value=float(values[0]), low=low, high=high)


LEVEL, POWER = 0.05, 0.8
"""Of the test for which the minimal detectable difference is stated."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two groups of dictionaries, each of several seeds, on one figure."""

    a: str
    """One group."""
    b: str
    """The other."""
    difference: float
    """Mean of a less mean of b."""
    noise: float
    """Standard deviation between seeds, pooled over both; nan with one seed of each."""
    detectable: float
    """The smallest true difference that these seeds show in POWER of cases at LEVEL."""

    @property
    def verdict(self) -> str:
        """`a > b`, `a < b`, `tie` below what is detectable, or `unknown` without seeds."""
        if math.isnan(self.detectable) or math.isnan(self.difference):
            return "unknown"
        if abs(self.difference) < self.detectable or self.difference == 0:
            return "tie"
        return f"{self.a} {'>' if self.difference > 0 else '<'} {self.b}"


def compare(name_a: str, a: Sequence[float], name_b: str, b: Sequence[float]) -> Comparison:
    """Hold two groups of seeds against each other.

    detectable = (t_(1 - LEVEL / 2) + t_POWER) * noise * sqrt(1 / n_a + 1 / n_b), with n_a + n_b - 2
    degrees of freedom.

    Raises:
        ValueError: If a group is empty.
    """
    if not a or not b:
        raise MonosemaError(f"both groups must have a value, got {len(a)} and {len(b)}")
    freedom = len(a) + len(b) - 2
    noise = detectable = math.nan
    if freedom > 0:
        squares = sum(float(np.var(values)) * len(values) for values in (a, b))
        noise = math.sqrt(squares / freedom)
        t = stats.t.ppf(1 - LEVEL / 2, freedom) + stats.t.ppf(POWER, freedom)
        detectable = float(t) * noise * math.sqrt(1 / len(a) + 1 / len(b))
    difference = float(np.mean(a) - np.mean(b))
    return Comparison(a=name_a, b=name_b, difference=difference, noise=noise, detectable=detectable)


def compare_all(groups: Mapping[str, Sequence[float]]) -> list[Comparison]:
    """Every pair of groups once, in their order."""
    names = list(groups)
    return [
        compare(a, groups[a], b, groups[b]) for i, a in enumerate(names) for b in names[i + 1 :]
    ]


@contextmanager
def one_thread() -> Iterator[None]:
    """No operation is spread over threads meanwhile, so sums have the same last bit anywhere."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(n_threads)


def each_on_a_core(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results in order; several items at a time, each on one of torch's threads alone.

    A small decomposition that is spread over threads waits for the slowest of them hundreds of
    times: on a busy machine one of 576 x 576 takes 1.4 s on two threads, and 0.03 s on one.
    """
    n_threads = torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(n_threads) as pool:
        yield from pool.map(function, items)
