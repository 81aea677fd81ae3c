"""The table at the end of `sae train`, from the curves of the run."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from sae.cli import console
from sae.train.curves import PICTURE, read_curves

COLUMNS = ("dictionary", "FVU", "L0", "dead", "rows/s", "time")
LAST = 10
"""A figure is the mean over the last tenth of the logged steps: a single batch is noisy."""


def show_training(path: Path, title: str) -> None:
    """Print one row per dictionary, and where it lies."""
    curves = {name: curve for name, curve in read_curves(path).items() if name}
    n_logged = max((len(curve["rows"]) for curve in curves.values()), default=0)
    n_last = max(n_logged // LAST, 1)
    rows = [training_row(name, curve, n_last) for name, curve in curves.items()]
    note = (
        f"FVU, L0 and dead: means of the last {n_last} of {n_logged} logged batches, of rows that "
        "were trained on; rows/s: of this dictionary's steps alone"
    )
    console.table(title, COLUMNS, rows, note)
    picture = path / PICTURE
    console.OUT.print(f"train: {path}", soft_wrap=True)
    if picture.exists():
        console.OUT.print(f"curves: {picture}", soft_wrap=True)


def training_row(name: str, curve: Mapping[str, Sequence[float]], n_last: int) -> tuple[str, ...]:
    """One dictionary's figures over its last `n_last` logged steps, its speed and its time."""
    fvu, l0, dead = (_mean(curve.get(key, ())[-n_last:]) for key in ("fvu", "l0", "dead"))
    rows, speeds = curve["rows"], curve.get("rows_per_second", ())
    logged = zip(pairwise((0, *rows)), speeds, strict=False)
    seconds = sum((after - before) / speed for (before, after), speed in logged)
    speed = f"{rows[-1] / seconds:,.0f}" if seconds > 0 else "-"
    time = f"{seconds:,.1f} s" if seconds > 0 else "-"
    return (name, f"{fvu:.3f}", f"{l0:.1f}", f"{dead:.1%}", speed, time)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
