"""What the command shows: bars with an ETA, one table, one-line errors."""

import contextlib
import json
import logging
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from activations_cache.checks import Progress as Report

if TYPE_CHECKING:
    from sae.browser import ResultTable
    from sae.run.context import FactTable

OUT = Console(highlight=False)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)
SECONDS_PER_LINE = 10.0
_WIDTH = 13  # of a step's name and place

LEAST_SECONDS = 5.0
"""Of a unit's work before its ETA is shown."""


class Eta:
    """How long a unit's work will still take, as its reports come in.

    The slowest stretch between two reports does not count: it may hold a warm-up, and early on it
    would make seconds look like an hour. Nothing is said before there is enough to go by.
    """

    def __init__(self) -> None:
        """Start without a report."""
        self._began = self._last = (0.0, 0)
        self._slowest = (0.0, 0)
        self._n_reports = 0

    def update(self, done: int, now: float) -> None:
        """Take a report, at a time in seconds."""
        if self._n_reports == 0:
            self._began = self._last = (now, done)
        stretch = (now - self._last[0], done - self._last[1])
        if stretch[0] * max(self._slowest[1], 1) > self._slowest[0] * max(stretch[1], 1):
            self._slowest = stretch
        self._last = (now, done)
        self._n_reports += 1

    def seconds(self, total: int) -> float | None:
        """What is left of `total`; None while that is a guess."""
        now, done = self._last
        taken = now - self._began[0] - self._slowest[0]
        finished = done - self._began[1] - self._slowest[1]
        if self._n_reports < 4 or now - self._began[0] < LEAST_SECONDS or finished <= 0:
            return None
        return max(taken / finished * (total - done), 0.0)


class _EtaColumn(ProgressColumn):
    """The ETA of a bar."""

    def render(self, task: Task) -> Text:
        """The minutes and seconds that are left, if they are known."""
        eta: Eta | None = task.fields.get("eta")
        left = None if eta is None or task.total is None else eta.seconds(int(task.total))
        shown = "-:--" if left is None else f"{int(left) // 60}:{int(left) % 60:02d}"
        return Text(shown, style="progress.remaining")


class Record:
    """What a command shows, collected to be printed as one JSON object."""

    def __init__(self) -> None:
        """Collect from now on; lines and bars go to stderr meanwhile."""
        kinds = ("tables", "facts", "texts", "lines")
        self.shown: dict[str, Any] = {**{kind: [] for kind in kinds}, "data": None}


_record: Record | None = None


@contextlib.contextmanager
def as_json() -> Iterator[None]:
    """Print what a command shows as one JSON object on stdout at its end, and all else on stderr.

    A command that fails prints none.
    """
    global OUT, _record
    before, OUT, _record = OUT, ERR, Record()
    try:
        try:
            yield
        except typer.Exit:
            typer.echo(json.dumps(_record.shown, indent=1))
            raise
        typer.echo(json.dumps(_record.shown, indent=1))
    finally:
        OUT, _record = before, None


class _WithLines(Progress):
    """Bars, and below them lines that say more."""

    lines: Sequence[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars, then the lines; as many as fit on the screen."""
        yield self.make_tasks_table(self.tasks)
        shown = self.lines[: max(OUT.height - 3, 1)]
        yield from (
            Text(f"  {line}", style="dim", overflow="ellipsis", no_wrap=True) for line in shown
        )


class _Bars:
    """One bar at a time, for the unit that a step reports at the moment."""

    def __init__(self, progress: _WithLines, label: str) -> None:
        self.progress, self.label = progress, label
        self.unit, self.eta = "starting", Eta()
        self.task = progress.add_task(label, total=None, unit=self.unit)

    def __call__(self, done: int, total: int, unit: str) -> None:
        unit, *self.progress.lines = unit.split("\n")
        kind = unit.split(" · ")[0]  # behind it stands what changes, such as a running cost
        if kind != self.unit:
            self.progress.remove_task(self.task)
            self.unit, self.eta = kind, Eta()
            self.task = self.progress.add_task(self.label, total=total, unit=unit, eta=self.eta)
        self.eta.update(done, time.monotonic())
        self.progress.update(self.task, completed=done, total=total, unit=unit)


class _Lines:
    """The same for a log file: a line with the ETA every few seconds."""

    def __init__(self, label: str) -> None:
        self.label, self.unit, self.eta = label, "", Eta()
        self.shown = time.monotonic()

    def __call__(self, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        unit, *lines = unit.split("\n")
        kind = unit.split(" · ")[0]
        if kind != self.unit:
            self.unit, self.eta = kind, Eta()
        self.eta.update(done, now)
        if now - self.shown >= SECONDS_PER_LINE:
            self.shown = now
            left = self.eta.seconds(total)
            eta = "" if left is None else f", {left:.0f} s left"
            OUT.print(f"  {self.label}: {done:,} of {total:,} {unit}{eta}", soft_wrap=True)
            for line in lines:
                OUT.print(f"    {line}", soft_wrap=True)


@contextlib.contextmanager
def step(label: str, place: tuple[int, int] | None = None) -> Iterator[Report]:
    """Show a step while it runs and one line with its time when it is done.

    Args:
        label: Its name.
        place: Which of how many steps it is, where there are several.
    """
    began = time.monotonic()
    label = _placed(label, place)
    if OUT.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn(f"{{task.description:<{_WIDTH}}}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            _EtaColumn(),
        )
        with _WithLines(*columns, console=OUT, transient=True, refresh_per_second=4) as progress:
            yield _Bars(progress, label)
    else:
        yield _Lines(label)
    OUT.print(f"[green]✓[/] {label:<{_WIDTH}} {time.monotonic() - began:6.1f} s")


def _placed(label: str, place: tuple[int, int] | None) -> str:
    return label if place is None else f"{place[0]}/{place[1]} {label}"


def skipped(label: str, path: object, place: tuple[int, int] | None = None) -> None:
    """Say that a step's result is there already."""
    OUT.print(f"[dim]✓ {_placed(label, place):<{_WIDTH}} done before: {path}[/]", soft_wrap=True)


class _Log(logging.Handler):
    """Prints what the library logs, above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        ERR.print(self.format(record), markup=False)


@contextlib.contextmanager
def showing_logs() -> Iterator[None]:
    """Print warnings of the library, and what the cache says of its rows, on stderr."""
    logger, handler = logging.getLogger("activations_cache"), _Log()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def say(line: str) -> None:
    """Print one line, however long it is."""
    if _record is not None:
        _record.shown["lines"].append(Text.from_markup(line).plain)
        return
    OUT.print(line, soft_wrap=True)


def written(text: str) -> None:
    """Print a text as it is, for a file."""
    if _record is not None:
        _record.shown["lines"] += text.splitlines()
        return
    typer.echo(text, nl=False)


def data(make: Callable[[], object]) -> None:
    """Add to the JSON object, if there is one, what a command knows beyond what it shows."""
    if _record is not None:
        _record.shown["data"] = make()


def table(title: str, shown: "ResultTable") -> None:
    """Print a table, and its note under it."""
    if _record is not None:
        rows = [dict(zip(shown.columns, row, strict=True)) for row in shown.rows]
        _record.shown["tables"].append({"title": title, "rows": rows, "note": shown.note})
        return
    view = Table(
        title=title,
        title_justify="left",
        caption=shown.note,
        caption_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        collapse_padding=True,  # so that the results fit into 80 columns
    )
    columns, rows = shown.columns, shown.rows
    widest = [max((len(row[i]) for row in rows), default=0) for i in range(len(columns))]
    needed = sum(max(pair) for pair in zip(widest, map(len, columns), strict=True))
    if needed + 2 * len(columns) > OUT.width:  # headings wrap, figures never
        columns = [_wrapped(*pair) for pair in zip(columns, widest, strict=True)]
    for i, (column, width) in enumerate(zip(columns, widest, strict=True)):
        view.add_column(column, justify="left" if i == 0 else "right", min_width=width)
    for row in rows:
        view.add_row(*row)
    OUT.print(view, crop=False)  # a narrow screen loses no figures


def _wrapped(heading: str, widest: int) -> str:
    return textwrap.fill(heading, max(widest, *map(len, heading.split()), 1))


def facts(shown: "FactTable") -> None:
    """Print names and what they stand for, one below the other; long values wrap."""
    if _record is not None:
        _record.shown["facts"].append({
            "title": shown.title,
            "rows": shown.rows,
            "note": shown.note,
        })
        return
    view = Table.grid(padding=(0, 2))
    view.add_column(style="dim", no_wrap=True)
    view.add_column(overflow="fold")
    for name, value in shown.rows:
        view.add_row(escape(name), escape(value))
    OUT.print(f"[bold]{escape(shown.title)}[/]", soft_wrap=True)
    OUT.print(view)
    OUT.print(f"[dim]{escape(shown.note)}[/]\n" if shown.note else "")


def parts(shown: "Iterable[Any]") -> None:
    """Print sections and facts in their order."""
    for part in shown:
        if hasattr(part, "table"):
            table(*part)
        else:
            facts(part)


def error(message: str) -> None:
    """Print one line to stderr."""
    line = " ".join(message.split())
    ERR.print(f"error: {line}", markup=False)


def side_by_side(title: str, left: tuple[str, str], right: tuple[str, str], note: str) -> None:
    """Print two texts beside each other, each under its name."""
    if _record is not None:
        _record.shown["texts"].append({"title": title, **dict([left, right]), "note": note})
        return
    view = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    for name, _ in (left, right):
        view.add_column(name, ratio=1, overflow="fold")
    view.add_row(*(escape(text) for _, text in (left, right)))
    OUT.print(view)
