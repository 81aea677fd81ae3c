"""Groups of dictionaries at equal L0, ties named, and Pareto plots."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from activations_cache.checks import Progress, silent
from sae.browser import ResultTable
from sae.evaluate.report import ParetoPoint, at_equal_l0, pareto, write_record
from sae.run.context import CacheOrPath, DictionaryOrPath, Section, Steps, silent_steps, steps_to
from sae.run.measuring import (
    MeasuredDictionary,
    Measurement,
    MeasureRequest,
    MeasureTarget,
    SplicedInto,
    measure,
    targets_of,
)
from sae.run.page import ParetoPanel, Series, plot, write_page
from sae.run.studies import Figure, figures
from sae.run.tables import details
from sae.statistics import Comparison, compare_all

Groups = Sequence[DictionaryOrPath] | Mapping[str, DictionaryOrPath | Sequence[DictionaryOrPath]]
"""Dictionaries by group, or without names."""


class Verdicts(NamedTuple):
    """One figure of all groups."""

    figure: str
    values: dict[str, list[float]]
    """By group, one per seed, at the L0 of the comparison."""
    pairs: list[Comparison]


class DictionaryComparison(NamedTuple):
    """Groups of dictionaries at one L0."""

    measurement: Measurement
    l0: float
    """Where they are compared."""
    verdicts: list[Verdicts]
    """By figure."""

    @property
    def sections(self) -> list[Section]:
        """The tables, the last one with the verdicts."""
        verdicts = _section(self.verdicts, self.measurement, self.l0)
        return [*self.measurement.sections, verdicts]

    def _repr_html_(self) -> str:
        return "".join(section._repr_html_() for section in self.sections)

    @property
    def record(self) -> dict[str, Any]:
        """What is written as JSON."""
        entries = self.measurement.entries
        return {
            **self.measurement.record,
            "l0": self.l0,
            "groups": {name: entry.group for name, entry in entries.items()},
            "seeds": {name: entry.seed for name, entry in entries.items()},
            "comparisons": {
                v.figure: [{**vars(pair), "verdict": pair.verdict} for pair in v.pairs]
                for v in self.verdicts
            },
        }


def compare(  # noqa: PLR0913
    groups: Sequence[DictionaryOrPath]
    | Mapping[str, DictionaryOrPath | Sequence[DictionaryOrPath]],
    cache: CacheOrPath,
    *,
    hook_point: str | None = None,
    l0: float | None = None,
    model: bool = True,
    contexts: int = 24,
    images: int = 2000,
    probe: int = 0,
    structure: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> DictionaryComparison:
    """Hold groups of dictionaries against each other at equal L0.

    Args:
        groups: Dictionaries by group, those of one being its seeds and its sweep over L0; without
            names, dictionaries of one recipe are a group.
        cache: What they are measured on.
        hook_point: Which stream; that of the dictionaries when absent.
        l0: Where they are compared; at the median when absent.
        model: Whether each is also spliced into the cache's model.
        contexts: Held-out contexts that each is spliced into.
        images: The same of a cache of images.
        probe: Probe so many of the cache's labels.
        structure: Measure stability over seeds, description length and meta-score as well.
        force: Compare dictionaries of another model or place too; the result names what differs.
        progress: Called in every step.

    Raises:
        TypeError: If an argument is of another class.
        ValueError: If a dictionary does not fit the cache, or nothing is held out.
    """
    spliced = SplicedInto(contexts, images) if model else None
    targets = _targets(groups)
    request = MeasureRequest(
        targets, cache, hook_point, spliced, probe, structure=structure, force=force
    )
    return compare_groups(request, l0, steps_to(progress))


def _targets(
    groups: Sequence[DictionaryOrPath]
    | Mapping[str, DictionaryOrPath | Sequence[DictionaryOrPath]],
) -> tuple[MeasureTarget, ...]:
    if not isinstance(groups, Mapping):
        return targets_of(groups)
    return tuple(
        target._replace(group=group)
        for group, members in groups.items()
        for target in targets_of(members)
    )


def compare_groups(
    request: MeasureRequest, l0: float | None = None, steps: Steps = silent_steps
) -> DictionaryComparison:
    """Measure what a request names, and compare at an L0, or at the median."""
    measured = measure(request, steps)
    report = measured.report.reconstruction
    target = l0 or statistics.median(report[name].l0 for name in measured.entries)
    verdicts = [_verdicts(figure, measured, target) for figure in _figures(measured)]
    return DictionaryComparison(measured, target, verdicts)


def write_comparison(comparison: DictionaryComparison, out: Path) -> dict[str, Path]:
    """Write plots, a page and all figures into a directory; returns the files by their kind."""
    measured, l0 = comparison.measurement, comparison.l0
    out.mkdir(parents=True, exist_ok=True)
    panels = [_panel(figure, measured) for figure in _figures(measured)]
    files = {"plots": plot(panels, l0, out / "pareto.png")}
    files["page"] = out / "index.html"
    sections = [*comparison.sections, *details(measured.report, measured.probes)]
    write_page(files["page"], f"Comparison at L0 = {l0:.3g}", sections, files["plots"])
    files["figures"] = out / "compare.json"
    write_record(files["figures"], comparison.record)
    return files


def _figures(measured: Measurement) -> list[Figure]:
    compared, probes = figures(measured.report), measured.probes
    if probes is not None:
        compared.append(Figure("probe F1, k=1", False, lambda name: probes.f1[name][0]))
    return compared


def _points(figure: Figure, measured: Measurement, group: str) -> list[ParetoPoint]:
    return [
        ParetoPoint(
            l0=measured.report.reconstruction[name].l0, value=figure.of(name), seed=entry.seed
        )
        for name, entry in measured.entries.items()
        if entry.group == group
    ]


def _groups(entries: dict[str, MeasuredDictionary]) -> list[str]:
    return list(dict.fromkeys(entry.group for entry in entries.values()))


def _verdicts(figure: Figure, measured: Measurement, target: float) -> Verdicts:
    points = {group: _points(figure, measured, group) for group in _groups(measured.entries)}
    values = {group: at_equal_l0(of_one, target) for group, of_one in points.items()}
    return Verdicts(figure.name, values, compare_all({g: v for g, v in values.items() if v}))


def _panel(figure: Figure, measured: Measurement) -> ParetoPanel:
    series = [
        Series(group, points, pareto(points, smaller_is_better=figure.smaller_is_better))
        for group in _groups(measured.entries)
        for points in [_points(figure, measured, group)]
    ]
    if figure.name.startswith("probe"):
        return ParetoPanel(figure.name, series, {})
    others = [name for name in measured.report.reconstruction if name not in measured.entries]
    rivals = {
        name: ParetoPoint(l0=measured.report.reconstruction[name].l0, value=figure.of(name))
        for name in others
    }
    return ParetoPanel(figure.name, series, rivals)


def _section(verdicts: Sequence[Verdicts], measured: Measurement, target: float) -> Section:
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
