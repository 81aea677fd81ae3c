"""The page of an evaluation or a study, one HTML file without scripts, and its plots as PNGs.

The feature browser on a local address: for the command, and in a cell of a notebook.
"""

import base64
import io as bytes_io
import math
import threading
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from activations_cache import io
from activations_cache.checks import Progress, silent
from sae import notebook
from sae.browser import ResultTable
from sae.browser.server import BrowserServer, PromptView
from sae.evaluate.report import ParetoPoint
from sae.read_out import ReadOutName
from sae.run.browse_latents import PromptReader
from sae.run.browsing import INDEX, browser_folder, write_browser
from sae.run.config import RunConfig, browsed_config
from sae.run.context import Run, Section
from sae.run.measuring import Measurement
from sae.run.tables import details

STYLE = """
main { max-width: 1500px; }
section { margin-top: 2.2rem; }
.wide {
  overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.8rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--muted); font-weight: 550; font-size: 0.87rem; vertical-align: bottom; }
tbody tr { border-top: 1px solid var(--line); }
tbody th { font-weight: 550; }
img { max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 10px; }
"""


def write_evaluation(path: Path, measurement: Measurement) -> None:
    """Write the page of an evaluation: its tables, and every figure with its interval."""
    title = f"Evaluation of {', '.join(measurement.entries)}"
    more = details(measurement.report, measurement.probes)
    write_page(path, title, [*measurement.sections, *more])


def write_page(
    path: Path,
    title: str,
    sections: Sequence[Section],
    picture: Path | None = None,
    above: Mapping[str, Path] | None = None,
) -> None:
    """Write the page.

    Args:
        path: The file.
        title: Of the page.
        sections: Its tables, in order.
        picture: A PNG to show above the second table.
        above: PNGs by the title of the section that each stands above.
    """
    pictures = above or {}
    shown = [
        (_picture(pictures[section.title], section.title) if section.title in pictures else "")
        + _section(section)
        for section in sections
    ]
    if picture is not None:
        shown.insert(1, _picture(picture, "the figures"))
    sheets = (files("sae.browser") / name for name in ("colours.css", "base.css"))
    style = "".join(sheet.read_text() for sheet in sheets) + STYLE
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{''.join(shown)}</main>\n</body>\n</html>\n"
    )
    io.write_files({path: text.encode()})


def _section(section: Section) -> str:
    return (
        f"<section>\n<h2>{escape(section.title)}</h2>\n{_table(section.table)}"
        f'<p class="note">{escape(section.table.note)}</p>\n</section>\n'
    )


def _table(table: ResultTable) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in table.rows
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>\n"
    )


def _picture(path: Path, what: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(what)}" src="data:image/png;base64,{data}">'
    return f"<section>{image}</section>\n"


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart by colour-blind readers as well."""

MARKERS = "osD^vPX"

MARGIN = 1.4
"""Factor of L0 that is left free on either side."""


WIDE = 4.0
"""Largest by smallest value from which on a figure is drawn on a logarithmic scale."""


class ShownLine(NamedTuple):
    """A curve, and the points that it was fitted to."""

    name: str
    curve: Sequence[tuple[float, float]]
    points: Sequence[tuple[float, float]] = ()
    is_null: bool = False
    """Dashed, in the colour of the line before it."""


class LinePanel(NamedTuple):
    """Lines over one axis."""

    title: str
    x: str
    lines: Sequence[ShownLine]
    log: bool = False
    """Whether x goes by powers of ten."""


def plot_lines(panels: Sequence[LinePanel], top: float = 1.0) -> bytes:
    """Draw panels side by side as a PNG; y goes from 0 to `top`."""
    figure = Figure(figsize=(4.6 * len(panels), 4.2), dpi=140, layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        number = -1
        for line in panel.lines:
            number += not line.is_null
            colour = COLOURS[max(number, 0) % len(COLOURS)]
            style = "--" if line.is_null else "-"
            if line.curve:
                axis.plot(*zip(*line.curve, strict=True), style, color=colour, label=line.name)
            if line.points:
                marker, name = "x" if line.is_null else "o", None if line.curve else line.name
                x, y = zip(*line.points, strict=True)
                axis.scatter(x, y, s=18, color=colour, marker=marker, label=name)
        axis.set(title=panel.title, xlabel=panel.x, ylim=(-0.02 * top, 1.02 * top))
        if panel.log:
            axis.set_xscale("log")
            axis.set_xticks(_ticks(*axis.get_xlim()))
            _plain_numbers(axis.xaxis)
        else:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(visible=True, color="0.92", linewidth=0.6)
        if panel.lines:
            axis.legend(fontsize=7, frameon=False)
    data = bytes_io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def plot_matrices(matrices: Mapping[str, Sequence[Sequence[float]]], names: Sequence[str]) -> bytes:
    """Draw a heat map of each, all with one scale from 0 to 1, as a PNG."""
    n_columns = min(4, max(1, len(matrices)))
    n_rows = max(1, math.ceil(len(matrices) / n_columns))
    figure = Figure(figsize=(4 * n_columns, 3.8 * n_rows), dpi=120, layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axis in axes[len(matrices) :]:
        axis.axis("off")
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=False):
        image = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks(range(len(names)), names, fontsize=6)
        figure.colorbar(image, ax=axis, shrink=0.8)
    data = bytes_io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


class Series(NamedTuple):
    """One group."""

    name: str
    points: list[ParetoPoint]
    front: list[ParetoPoint]
    """What none of the group beats; joined by a line."""


class ParetoPanel(NamedTuple):
    """One figure against L0."""

    name: str
    series: list[Series]
    baselines: dict[str, ParetoPoint]


def plot(panels: Sequence[ParetoPanel], target: float, path: Path) -> Path:
    """Draw the panels side by side, with the L0 of the comparison as a dotted line."""
    figure = Figure(figsize=(4.2 * len(panels), 4.4), dpi=140, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        draw(axis, panel, target)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)
    return path


def _plain_numbers(part: Axis) -> None:
    """Write the numbers of an axis without powers of ten, at its own marks alone."""
    part.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    part.set_minor_locator(NullLocator())


def draw(axis: Axes, panel: ParetoPanel, target: float) -> None:
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
    values = [p.l0 for series in panel.series for p in series.points if p.l0 > 0] + [target]
    low, high = min(values) / MARGIN, max(values) * MARGIN
    axis.set_xlim(low, high)
    axis.set_xticks(_ticks(low, high))
    values = [p.value for series in panel.series for p in series.points]
    values += [p.value for p in panel.baselines.values()]
    if min(values) > 0 and max(values) > WIDE * min(values):
        axis.set_yscale("log")  # or baselines press what is compared into a line
        axis.set_yticks(_ticks(*axis.get_ylim()))
    for part in (axis.xaxis, axis.yaxis):
        _plain_numbers(part)


def _ticks(low: float, high: float) -> list[float]:
    """Marks of a logarithmic axis, the fewer the more powers of ten it spans."""
    marks = (1, 1.5, 2, 3, 5, 7) if high < 30 * low else (1, 2, 5) if high < 1e3 * low else (1,)
    ticks = [m * 10.0**e for e in range(-9, 10) for m in marks]
    return [tick for tick in ticks if low <= tick <= high]


HEIGHT = 720
"""Of a cell's frame, in pixels: the table, and a latent's label and first examples."""


class BrowserInCell:
    """A folder of the feature browser, served to a notebook on this machine.

    As the last value of a cell it is shown in a frame. It is served until `close`, or until the
    process ends.
    """

    def __init__(
        self, folder: Path, prompts: PromptView | None = None, height: int = HEIGHT
    ) -> None:
        """Serve the folder on a free port of this machine alone.

        Raises:
            ValueError: If there is no browser in the folder.
        """
        self.server = BrowserServer(folder, prompts=prompts, in_frames=True)
        self.height = height
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Serve no more; what is shown stays as it is."""
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def __repr__(self) -> str:
        return f"feature browser: {self.server.url} ({self.server.folder / INDEX})"

    def _repr_html_(self) -> str:
        note = (
            f"{self!r}. An empty frame: the notebook runs on another machine; forward the port, or "
            "open the file"
        )
        return notebook.frame(self.server.url, self.height, note)


def prompt_view(config: RunConfig | None) -> PromptView | None:
    """What reads texts with the model of a run of texts; None for all else."""
    if config is None or config.cache.images is not None:
        return None
    run = Run(config)
    shown = [name for name in config.train.saes if not run.is_frozen(name)]
    return PromptView(PromptReader(run), {f"d{i}": name for i, name in enumerate(shown)})


def show(
    path: str | Path,
    *,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    force: bool = False,
    read_out: ReadOutName = "linear",
    height: int = HEIGHT,
    progress: Progress = silent,
) -> BrowserInCell:
    """Open the feature browser in a notebook's cell.

    Of a run its prompt view reads texts too.

    Args:
        path: What `sae.run.browse` returned; or what it takes, and then it is written first.
        out: As `sae.run.browse` has it, and so are `cache`, `force`, `read_out` and `progress`.
        cache: The same.
        force: The same.
        read_out: The same.
        height: Of the frame, in pixels.
        progress: The same.

    Raises:
        ConfigError: If the path is neither.
    """
    folder = Path(path).parent if Path(path).name == INDEX else Path(path)
    if (folder / INDEX).is_file():
        return BrowserInCell(folder, None, height)
    config = browsed_config(path)
    folder = browser_folder(path, config, out)
    write_browser(path, config, folder, cache, progress, force=force, read_out=read_out)
    return BrowserInCell(folder, prompt_view(config), height)
