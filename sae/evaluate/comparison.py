"""Groups of dictionaries at equal L0: figures of seeds and sweeps brought to one L0, and fronts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE = 0.1
"""Share by which a dictionary's L0 may be off and still be taken as it is."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One dictionary."""

    l0: float
    """Mean number of latents that fire."""
    value: float
    """A figure of it, such as its FVU."""
    seed: int = 0
    """Of its training: points of one seed are one sweep over L0."""


def at_equal_l0(
    points: Sequence[Point], target: float, tolerance: float = TOLERANCE
) -> list[float]:
    """The figure of each seed at one L0.

    Taken as it is where a dictionary's L0 is within the tolerance, else read between the two
    neighbours of that seed, linearly in log L0; seeds that have neither are left out.

    Raises:
        ValueError: If target is not above 0.
    """
    if target <= 0:
        raise ValueError(f"target must be above 0, got {target}")
    seeds = dict.fromkeys(point.seed for point in points)
    found = (_of_sweep([p for p in points if p.seed == s], target, tolerance) for s in seeds)
    return [value for value in found if not math.isnan(value)]


def _of_sweep(points: Sequence[Point], target: float, tolerance: float) -> float:
    usable = sorted((p for p in points if p.l0 > 0), key=lambda p: p.l0)
    near = [p for p in usable if abs(p.l0 - target) <= tolerance * target]
    if near:
        return min(near, key=lambda p: abs(p.l0 - target)).value
    below = [p for p in usable if p.l0 < target]
    above = [p for p in usable if p.l0 > target]
    if not below or not above:
        return math.nan
    a, b = below[-1], above[0]
    share = math.log(target / a.l0) / math.log(b.l0 / a.l0)
    return a.value + share * (b.value - a.value)


def pareto(points: Sequence[Point], *, smaller_is_better: bool) -> list[Point]:
    """The points that none of the same or a smaller L0 beats, by ascending L0."""
    sign = 1 if smaller_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.l0, sign * p.value)):
        if not math.isnan(point.value) and (
            not front or sign * point.value < sign * front[-1].value
        ):
            front.append(point)
    return front
