"""`sae compare`: groups of dictionaries at equal L0, ties named, and Pareto plots."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sae.browser import ResultTable
from sae.cli import console
from sae.cli.evaluation_page import write_page
from sae.cli.measuring import Entry, Measured, Request, measure, write
from sae.cli.pareto import Panel, Series, plot
from sae.cli.sections import Section, details
from sae.cli.seeds import Figure, figures
from sae.evaluate.report import Point, at_equal_l0, pareto
from sae.statistics import Comparison, compare_all


class Verdicts(NamedTuple):
    """One figure of all groups."""

    figure: str
    values: dict[str, list[float]]
    """By group, one per seed, at the L0 of the comparison."""
    pairs: list[Comparison]


def compare_and_show(request: Request, out: Path, l0: float | None) -> None:
    """Measure, compare, plot and print."""
    measured = measure(request)
    target = l0 or statistics.median(of.l0 for of in _own(measured).values())
    compared = _figures(measured)
    verdicts = [_verdicts(figure, measured, target) for figure in compared]
    panels = [_panel(figure, measured) for figure in compared]
    sections = [*measured.sections, _section(verdicts, measured, target)]
    for section in sections:
        table = section.table
        console.table(section.title, table.columns, table.rows, table.note)
    out.mkdir(parents=True, exist_ok=True)
    path = plot(panels, target, out / "pareto.png")
    console.OUT.print(f"plots: {path}", soft_wrap=True)
    page = out / "index.html"
    more = details(measured.report, measured.probes)
    write_page(page, f"Comparison at L0 = {target:.3g}", [*sections, *more], path)
    console.OUT.print(f"page: {page}", soft_wrap=True)
    write(
        out / "compare.json",
        {
            **measured.record,
            "l0": target,
            "groups": {name: entry.group for name, entry in measured.entries.items()},
            "seeds": {name: entry.seed for name, entry in measured.entries.items()},
            "comparisons": {
                v.figure: [{**vars(pair), "verdict": pair.verdict} for pair in v.pairs]
                for v in verdicts
            },
        },
    )


def _own(measured: Measured) -> dict:
    return {name: measured.report.reconstruction[name] for name in measured.entries}


def _figures(measured: Measured) -> list[Figure]:
    found, probes = figures(measured.report), measured.probes
    if probes is not None:
        found.append(Figure("probe F1, k=1", False, lambda name: probes.f1[name][0]))
    return found


def _points(figure: Figure, measured: Measured, group: str) -> list[Point]:
    return [
        Point(l0=measured.report.reconstruction[name].l0, value=figure.of(name), seed=entry.seed)
        for name, entry in measured.entries.items()
        if entry.group == group
    ]


def _groups(entries: dict[str, Entry]) -> list[str]:
    return list(dict.fromkeys(entry.group for entry in entries.values()))


def _verdicts(figure: Figure, measured: Measured, target: float) -> Verdicts:
    points = {group: _points(figure, measured, group) for group in _groups(measured.entries)}
    values = {group: at_equal_l0(of_one, target) for group, of_one in points.items()}
    return Verdicts(figure.name, values, compare_all({g: v for g, v in values.items() if v}))


def _panel(figure: Figure, measured: Measured) -> Panel:
    series = [
        Series(group, points, pareto(points, smaller_is_better=figure.smaller_is_better))
        for group in _groups(measured.entries)
        for points in [_points(figure, measured, group)]
    ]
    if figure.name.startswith("probe"):
        return Panel(figure.name, series, {})
    others = [name for name in measured.report.reconstruction if name not in measured.entries]
    rivals = {
        name: Point(l0=measured.report.reconstruction[name].l0, value=figure.of(name))
        for name in others
    }
    return Panel(figure.name, series, rivals)


def _section(verdicts: Sequence[Verdicts], measured: Measured, target: float) -> Section:
    columns = ("figure", "a", "b", "a - b", "detectable", "verdict")
    rows = [
        (
            v.figure,
            pair.a,
            pair.b,
            f"{pair.difference:+.4f}",
            _number(pair.detectable),
            _verdict(pair),
        )
        for v in verdicts
        for pair in v.pairs
    ]
    left_out = [g for g in _groups(measured.entries) if not verdicts[0].values[g]]
    note = (
        "detectable: the smallest difference that these seeds show at 5 % with a power of 80 %; "
        "below it a tie; unknown with one seed of each"
    )
    if left_out:
        note += f"; without an L0 near {target:.3g}: {', '.join(left_out)}"
    return Section(f"at L0 = {target:.3g}", ResultTable(columns, tuple(rows), note))


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _verdict(pair: Comparison) -> str:
    """In the words of the table's columns, which name the groups."""
    if pair.verdict in {"tie", "unknown"}:
        return pair.verdict
    return "a > b" if pair.difference > 0 else "a < b"
