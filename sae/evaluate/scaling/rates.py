"""The best learning rate of each size of run, and how it falls with compute."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy.stats import t

from sae.evaluate.scaling.runs import Run


class Fitted(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class RateLaw:
    """lr*(C) = factor C^exponent over C = latents x rows (Templeton et al. 2024)."""

    exponent: Fitted
    """Of a straight line through the logarithms; Student's interval."""
    factor: float
    """At C = 1."""
    points: tuple[tuple[float, float], ...]
    """(C, lr*) of each size with three rates: the vertex of a parabola through the best three."""
    warnings: tuple[str, ...]
    """Sizes that were left out."""

    def rate(self, compute: float) -> float:
        """The best learning rate that is expected."""
        return self.factor * compute**self.exponent.value


def fitted(values: Float64[np.ndarray, " resample"]) -> Fitted:
    """The first of the values, with the quantiles of the others."""
    low, high = np.quantile(values[1:], [0.025, 0.975]) if len(values) > 1 else (np.nan, np.nan)
    return Fitted(float(values[0]), float(low), float(high))


def by_size(runs: Sequence[Run]) -> dict[tuple, list[Run]]:
    """Runs that differ in the learning rate alone, by size, the smallest rate first."""
    sizes: dict[tuple, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.lr or 0.0):
        sizes[run.d_sae, run.k, run.rows].append(run)
    return sizes


def best_rates(runs: Sequence[Run]) -> list[Run]:
    """All runs, but of sizes whose rate was varied those of the best rate alone."""
    kept = []
    for of_size in by_size(runs).values():
        rate = min(of_size, key=lambda run: run.loss).lr
        kept += [run for run in of_size if run.lr == rate]
    return kept


def rate_law(runs: Sequence[Run]) -> RateLaw | None:
    """The law of the sizes with three learning rates or more; None where they are not three."""
    points, warnings = [], []
    for (d_sae, _, rows), of_size in by_size(runs).items():
        if len({run.lr for run in of_size}) < 3 or any(run.lr is None for run in of_size):
            continue
        rate = _vertex(of_size)
        if rate is None:
            warnings.append(
                f"the best rate of width {d_sae} and {rows} rows is at the end of those that were "
                "tried; try more"
            )
        else:
            points.append((float(d_sae) * rows, rate))
    if len({compute for compute, _ in points}) < 3:
        return None
    x, y = np.log(points).T
    (slope, start), covariance = np.polyfit(x, y, 1, cov=True)
    half = float(t.ppf(0.975, len(points) - 2) * covariance[0, 0] ** 0.5)
    return RateLaw(
        exponent=Fitted(float(slope), float(slope) - half, float(slope) + half),
        factor=float(np.exp(start)),
        points=tuple(points),
        warnings=tuple(warnings),
    )


def _vertex(runs: Sequence[Run]) -> float | None:
    """Where a parabola in log lr through the best run and its neighbours is lowest."""
    place = min(range(len(runs)), key=lambda i: runs[i].loss)
    if place in (0, len(runs) - 1):
        return None
    three = runs[place - 1 : place + 2]
    x = np.log([float(run.lr or np.nan) for run in three])
    square, slope, _ = np.polyfit(x, [run.loss for run in three], 2)
    return float(np.exp(-slope / (2 * square)))
