"""Pareto plots of figures against L0 as a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from sae.evaluate.report import Point

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart by colour-blind readers as well."""

MARKERS = "osD^vPX"

MARGIN = 1.4
"""Factor of L0 that is left free on either side."""


WIDE = 4.0
"""Largest by smallest value from which on a figure is drawn on a logarithmic scale."""


class Series(NamedTuple):
    """One group."""

    name: str
    points: list[Point]
    front: list[Point]
    """What none of the group beats; joined by a line."""


class Panel(NamedTuple):
    """One figure against L0."""

    name: str
    series: list[Series]
    baselines: dict[str, Point]


def plot(panels: Sequence[Panel], target: float, path: Path) -> Path:
    """Draw the panels side by side, with the L0 of the comparison as a dotted line."""
    figure = Figure(figsize=(4.2 * len(panels), 4.4), dpi=140, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        draw(axis, panel, target)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)
    return path


def draw(axis: Axes, panel: Panel, target: float) -> None:
    """Draw one panel."""
    for number, series in enumerate(panel.series):
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number % len(MARKERS)]
        line = [(p.l0, p.value) for p in series.front]
        axis.plot(*zip(*line, strict=True), color=colour, linewidth=1) if line else None
        xs, ys = [p.l0 for p in series.points], [p.value for p in series.points]
        axis.scatter(xs, ys, color=colour, marker=marker, s=28, label=series.name, alpha=0.85)
    for number, (name, point) in enumerate(panel.baselines.items()):
        axis.scatter(
            [point.l0], [point.value], color="0.55", marker="1234"[number % 4], s=50, label=name
        )
    axis.axvline(target, color="0.7", linestyle=":", linewidth=1, zorder=0)
    axis.set_xscale("log")
    axis.set_xlabel("L0")
    axis.set_title(panel.name, fontsize=10)
    axis.grid(visible=True, color="0.92", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    found = [p.l0 for series in panel.series for p in series.points if p.l0 > 0] + [target]
    low, high = min(found) / MARGIN, max(found) * MARGIN
    axis.set_xlim(low, high)
    axis.set_xticks(_ticks(low, high))
    values = [p.value for series in panel.series for p in series.points]
    values += [p.value for p in panel.baselines.values()]
    if min(values) > 0 and max(values) > WIDE * min(values):
        axis.set_yscale("log")  # or baselines press what is compared into a line
        axis.set_yticks(_ticks(*axis.get_ylim()))
    for part in (axis.xaxis, axis.yaxis):
        part.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        part.set_minor_locator(NullLocator())


def _ticks(low: float, high: float) -> list[float]:
    ticks = [m * 10.0**e for e in range(-6, 7) for m in (1, 1.5, 2, 3, 5, 7)]
    return [tick for tick in ticks if low <= tick <= high]
