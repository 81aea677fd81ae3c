"""Reports of several seeds as plain rows: mean and 95 % interval of the mean over seeds."""

import math
from collections.abc import Callable, Mapping, Sequence

from sae.evaluate.ground_truth.run import GroundTruthReport

T_95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t that 95 % lie within, by degrees of freedom; 1.96 is used beyond."""

COLUMNS: dict[str, Callable[[GroundTruthReport], float]] = {
    "MCC": lambda report: report.directions.mcc,
    "MMCS": lambda report: report.directions.mmcs,
    "recovered": lambda report: report.directions.recovered,
    "unique": lambda report: report.directions.uniqueness,
    "F1": lambda report: report.firing.f1,
    "F1 nearest": lambda report: report.f1_nearest,
    "FVU": lambda report: report.fvu,
    "shrinkage": lambda report: report.shrinkage,
    "L0": lambda report: report.l0,
    "dead": lambda report: report.dead,
}
"""The figures of a row."""

CHANCE: dict[str, Callable[[GroundTruthReport], float]] = {
    "MCC": lambda report: report.chance_directions.mcc,
    "MMCS": lambda report: report.chance_directions.mmcs,
    "recovered": lambda report: report.chance_directions.recovered,
    "unique": lambda report: report.chance_directions.uniqueness,
    "F1": lambda report: report.chance_firing.f1,
}
"""The figures of the row of chance floors."""


def table_rows(reports: Mapping[str, Sequence[GroundTruthReport]]) -> list[tuple[str, ...]]:
    """A head, a row per dictionary, and below each the chance floor of its scores.

    Args:
        reports: By the dictionary's name, one report per seed; each report has its own world, so
            the interval holds the noise of training and of the world.
    """
    lines: list[tuple[str, ...]] = [("dictionary", "seeds", *COLUMNS)]
    for name, of_one in reports.items():
        n = str(len(of_one))
        lines.append((name, n, *_cells(of_one, COLUMNS)))
        lines.append((f"{name}, chance", n, *_cells(of_one, CHANCE)))
    return lines


def table_text(lines: Sequence[Sequence[str]]) -> str:
    """The rows as text in columns of one width each."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; nan for one value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    t = T_95[n - 1] if n <= len(T_95) else 1.96
    return mean, t * spread / math.sqrt(n)


def figure(values: Sequence[float]) -> str:
    """A cell: the mean, with its interval where there are several values."""
    mean, half = interval(values)
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ±{half:.3f}"


def _cells(
    reports: Sequence[GroundTruthReport],
    figures: Mapping[str, Callable[[GroundTruthReport], float]],
) -> list[str]:
    values = {name: [read(report) for report in reports] for name, read in figures.items()}
    return [figure(values[name]) if name in values else "" for name in COLUMNS]
