"""The training curves of a run: read from its CSV files, and drawn as one PNG."""

import csv
import io as bytes_io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from activations_cache import io

LOGS = "logs"
PICTURE = "curves.png"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart by colour-blind readers as well."""
STYLES = ("-", "--", ":", "-.")
MOST_BANDS = 4
"""Curves, that of the run among them, with more of which bands hide each other."""
PER_LINE = 4
PANEL_INCHES, LEGEND_INCHES = 2.7, 0.6
"""Panels side by side."""


class Panel(NamedTuple):
    """One figure over the rows that were trained on."""

    figure: str
    """Its name in the files; of those of the whole run without a dictionary's."""
    title: str
    """What it is, with its unit."""
    log: bool = False
    """Whether the axis is logarithmic."""
    band: tuple[str, str] | None = None
    """Figures between which a band is drawn."""
    times: float = 1.0
    """What turns it into the unit."""


PANELS = (
    Panel("fvu", "FVU (share of the variance)"),
    Panel("l0", "L0 (latents per row)"),
    Panel("dead", "dead latents (%)", times=100),
    Panel("shrinkage", "shrinkage (1: none)"),
    Panel("grad_norm", "gradient norm before clipping", log=True),
    Panel("density_q50", "density (share of rows): median (10-90 %)", True, ("q10", "q90")),
    Panel("threshold", "BatchTopK's threshold"),
    Panel("threshold_q50", "JumpReLU's thresholds: median (10-90 %)", False, ("q10", "q90")),
    Panel("rows_per_second", "rows per second: each one's steps, and the run"),
    Panel("loader_wait", "waiting for rows (% of the time)", times=100),
)

Curves = dict[str, dict[str, tuple[float, ...]]]


def read_curves(path: str | Path) -> Curves:
    """The training curves of each dictionary: {name: {"rows": ..., "fvu": ..., "l0": ...}}.

    What is of the run and no dictionary's stands under the empty name.
    """
    lines = _logged_lines(Path(path) / LOGS / "csv")
    if not lines:
        return {}
    rows = _column(lines, "rows")
    curves: Curves = {}
    for key in dict.fromkeys(key for line in lines for key in line):
        name, slash, metric = key.partition("/")
        if slash:
            curves.setdefault(name, {"rows": rows})[metric] = _column(lines, key)
        elif key not in {"rows", "step"}:
            curves.setdefault("", {"rows": rows})[key] = _column(lines, key)
    return curves


def draw(path: str | Path) -> Path | None:
    """Draw a run's curves into `curves.png` beside its checkpoints; None where none are logged."""
    curves = read_curves(path)
    panels = [p for p in PANELS if any(_has(curve, p.figure) for curve in curves.values())]
    if not panels:
        return None
    n_lines = -(-len(panels) // PER_LINE)
    height = PANEL_INCHES * n_lines + LEGEND_INCHES
    figure = Figure(figsize=(3.9 * PER_LINE, height), dpi=110)
    places = figure.subplots(n_lines, PER_LINE, squeeze=False).flatten()
    # layout engines draw everything twice to measure it
    edges = {"left": 0.04, "right": 0.99, "top": 1 - 0.3 / height, "bottom": 1.05 / height}
    figure.subplots_adjust(**edges, wspace=0.2, hspace=0.42)
    for axes, panel in zip(places, panels, strict=False):
        _draw_panel(axes, panel, curves)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    named = [axes.get_legend_handles_labels() for axes in places]
    shown = {
        label: handle
        for handles, labels in named
        for handle, label in zip(handles, labels, strict=True)
    }
    figure.legend(
        shown.values(), shown.keys(), loc="lower center", ncols=6, frameon=False, fontsize=9
    )
    data = bytes_io.BytesIO()
    figure.savefig(data, format="png")
    picture = Path(path) / PICTURE
    io.write_files({picture: data.getvalue()})
    return picture


def _draw_panel(axes: Axes, panel: Panel, curves: Curves) -> None:
    for number, (name, curve) in enumerate(curves.items()):
        if not _has(curve, panel.figure):
            continue
        colour = COLOURS[number % len(COLOURS)] if name else "0.3"
        style = STYLES[number // len(COLOURS) % len(STYLES)]
        values = [panel.times * value for value in curve[panel.figure]]
        label = name or "the whole run"
        marker = "o" if len(values) < 3 else ""
        axes.plot(
            curve["rows"], values, style, marker=marker, color=colour, lw=1.2, ms=3, label=label
        )
        if panel.band is not None and len(curves) <= MOST_BANDS:
            stem = panel.figure.rpartition("_")[0]
            low, high = (curve[f"{stem}_{key}"] for key in panel.band)
            axes.fill_between(curve["rows"], low, high, color=colour, alpha=0.12, lw=0)
    if panel.log:
        axes.set_yscale("log")
    elif panel.figure != "threshold_q50":
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel("rows", fontsize=8)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.figure == "rows_per_second":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(visible=True, color="0.92", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _has(curve: Mapping[str, tuple[float, ...]], figure: str) -> bool:
    return any(math.isfinite(value) for value in curve.get(figure, ()))


def _column(lines: list[dict[str, str]], key: str) -> tuple[float, ...]:
    return tuple(float(line.get(key) or "nan") for line in lines)


def _logged_lines(directory: Path) -> list[dict[str, str]]:
    """One line per logged step; where a resumed run repeated steps, the later lines count."""
    by_step: dict[int, dict[str, str]] = {}
    for file in sorted(directory.glob("from-step-*/metrics.csv")):
        with file.open(newline="") as lines:
            by_step |= {int(line["step"]): line for line in csv.DictReader(lines)}
    return [by_step[step] for step in sorted(by_step)]
