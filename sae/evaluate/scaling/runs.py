"""Finished runs as a law needs them: read from JSON, JSON lines, or directories of `sae run`.

The best learning rate of each size of run, and how it falls with compute.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy.stats import t

from activations_cache import seals
from activations_cache.checks import MonosemaError, positive


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What one trained dictionary was, and how well it did."""

    d_sae: int
    """Number of latents."""
    rows: int
    """Rows that it was trained on."""
    loss: float
    """Above 0: FVU over held-out rows, say; of one kind for all runs."""
    k: int | None = None
    """Latents that fire in a row, if that is fixed."""
    lr: float | None = None
    """Its learning rate, if that was varied."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("d_sae", "rows", "loss", "k", "lr"):
            if (value := getattr(self, name)) is not None:
                positive(name, value)

    @property
    def compute(self) -> float:
        """Compute in units of d_sae * rows, to which the cost of a step is proportional."""
        return float(self.d_sae) * self.rows


def read_runs(paths: Sequence[str | Path]) -> list[FinishedRun]:
    """Runs of all paths together.

    Args:
        paths: `.json` (a list of objects) or `.jsonl` files with Run's fields (others are passed
            over), or output directories of `sae run`, of which FVU over the held-out rows is the
            loss; frozen baselines are passed over.

    Raises:
        FileNotFoundError: If a path is missing.
        ValueError: If it holds something else.
    """
    results: list[FinishedRun] = []
    for path in map(Path, paths):
        try:
            records = _of_directory(path) if path.is_dir() else _of_file(path)
            results += [_run(record) for record in records]
        except (KeyError, TypeError, ValueError) as problem:
            raise MonosemaError(
                f"{path} must hold runs (d_sae, rows, loss), got a problem: {problem}"
            ) from problem
    return results


def _of_file(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def _of_directory(path: Path) -> Iterable[dict[str, Any]]:
    report = json.loads(seals.read(path / "evaluate" / "report.json"))
    for name, measured in report["reconstruction"].items():
        place = path / "train" / name
        if not place.is_dir():
            continue
        provenance = json.loads(seals.read(place / "provenance.json"))
        recipe = provenance["recipe"]
        if recipe["frozen"] == "none":
            yield {
                "d_sae": recipe["d_sae"],
                "k": recipe["activation"].get("k"),
                "rows": provenance["rows"],
                "loss": measured["fvu"],
                "lr": _rate(recipe),
            }


def _rate(recipe: dict[str, Any]) -> float | None:
    """The learning rate, where it is a number of the recipe and not found by a rule."""
    lr = recipe["optimizer"].get("lr")
    return lr if isinstance(lr, float) else None


def _run(record: dict[str, Any]) -> FinishedRun:
    known = {field.name: field for field in fields(FinishedRun)}
    missing = [n for n, field in known.items() if field.default is MISSING and n not in record]
    if missing:
        raise MonosemaError(f"{missing[0]} must be given, got none")
    given = {name: record[name] for name in known if record.get(name) is not None}
    for name, value in given.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise MonosemaError(f"{name} must be a number, got {value!r}")
    return FinishedRun(**given)


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


def by_size(runs: Sequence[FinishedRun]) -> dict[tuple, list[FinishedRun]]:
    """Runs that differ in the learning rate alone, by size, the smallest rate first."""
    sizes: dict[tuple, list[FinishedRun]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.lr or 0.0):
        sizes[run.d_sae, run.k, run.rows].append(run)
    return sizes


def best_rates(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """All runs, but of sizes whose rate was varied those of the best rate alone."""
    best_runs = []
    for of_size in by_size(runs).values():
        rate = min(of_size, key=lambda run: run.loss).lr
        best_runs += [run for run in of_size if run.lr == rate]
    return best_runs


def rate_law(runs: Sequence[FinishedRun]) -> RateLaw | None:
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


def _vertex(runs: Sequence[FinishedRun]) -> float | None:
    """Where a parabola in log lr through the best run and its neighbours is lowest."""
    place = min(range(len(runs)), key=lambda i: runs[i].loss)
    if place in (0, len(runs) - 1):
        return None
    three = runs[place - 1 : place + 2]
    x = np.log([float(run.lr or np.nan) for run in three])
    square, slope, _ = np.polyfit(x, [run.loss for run in three], 2)
    return float(np.exp(-slope / (2 * square)))
