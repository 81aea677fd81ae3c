"""Reseed noise: what differences between dictionaries can be told apart from another seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

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
        raise ValueError(f"both groups must have a value, got {len(a)} and {len(b)}")
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
