"""What a run and an evaluation say as tables, for the terminal and for their pages."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from sae.browser import ResultTable
from sae.evaluate.downstream import Accuracy, Downstream
from sae.evaluate.geometry import RowsShape
from sae.evaluate.probe_tasks import Signature
from sae.evaluate.report import EvaluationReport
from sae.evaluate.spaces import MeasureCheck, Similarity
from sae.evaluate.sparse_probe import Survey
from sae.evaluate.substitution import Substitution, SubstitutionEffect
from sae.explain.tables import SUMMARY, read_summary
from sae.run.context import Run, Section
from sae.run.images import image_table, mean_cell
from sae.statistics import Interval
from sae.train.curves import read_curves

COLUMNS = ("dictionary", "L0", "FVU", "dead", "CE rec. (zero)", "CE rec. (mean)", "Δ CE", "KL",
           "top-1")  # fmt: skip

QUANTILES = ("0.05", "0.5", "0.95")
"""Of a row's L0, on the page; the JSON has more."""


def text_table(report: EvaluationReport) -> ResultTable:
    """A row for each dictionary and baseline on a cache of text."""
    rows = []
    intact = report.substitution.get("intact")
    for name, measured in report.reconstruction.items():
        row = [name, f"{measured.l0:.1f}", f"{measured.fvu:.3f}"]
        row.append(f"{report.firing[name].dead_fraction:.1%}")
        if intact is None:
            rows.append(tuple(row))
            continue
        effect = intact.dictionaries[name]
        figures = (effect.ce_recovered_zero, effect.ce_recovered_mean, effect.ce_increase,
                   effect.kl, effect.top1_agreement)  # fmt: skip
        rows.append((*row, *(f"{figure.value:.3f}" for figure in figures)))
    columns = COLUMNS if intact else COLUMNS[:4]
    return ResultTable(columns, tuple(rows), _note(report))


def _note(report: EvaluationReport) -> str:
    """What the table's figures rest on."""
    name = next(iter(report.reconstruction))
    firing = report.firing[name]
    note = (
        f"{report.reconstruction[name].n_rows:,} held-out rows; dead: silent in {firing.n_rows:,} "
        f"rows, so with 95 % confidence rarer than {firing.dead_density_bound:.1e}"
    )
    return f"{note}; {_of_model(report)}"


def _of_model(report: EvaluationReport) -> str:
    """What the figures of the model rest on."""
    intact = report.substitution.get("intact")
    if intact is None:
        return "no loss: no model was run, or it predicts neither the next token nor masked ones"
    tokens = {"next token": "tokens", "masked token": "masked tokens"}[intact.loss]
    return (
        f"CE {intact.ce_base.value:.3f} nats on {intact.n_tokens:,} held-out {tokens}, "
        f"positions below {report.skip_positions} left intact"
    )


def probe_table(probes: Survey) -> ResultTable:
    """Mean AUCs over the labels."""
    columns = ("probe", *(f"AUC, k={k}" for k in probes.ks), "control", "control task")

    def shown(figure: float | None) -> str:
        return "" if figure is None else f"{figure:.3f}"

    rows = [
        (
            name,
            *map(shown, probes.auc[name]),
            shown(probes.control[name]),
            shown(probes.control_task.get(name)),
        )
        for name in probes.auc
    ]
    empty = ("" for _ in probes.ks[1:])
    rows.append(("dense", *empty, shown(probes.dense), "", shown(probes.dense_control_task)))
    note = (
        f"means over {', '.join(probes.labels)}; control: labels of other rows, k={probes.ks[-1]}; "
        "control task: a label at random for each token, learned by heart"
    )
    return ResultTable(columns, tuple(rows), note)


def details(report: EvaluationReport, probes: Survey | None) -> list[Section]:
    """What the one table leaves out: every figure with its interval."""
    sections = [
        Section("Reconstruction", _reconstruction(report)),
        Section("Firing", _firing(report)),
    ]
    sections += [
        Section(f"The model with the stream replaced, special positions {kind}", _effects(measured))
        for kind, measured in report.substitution.items()
    ]
    if report.downstream is not None:
        sections += _accuracies(report.downstream)
    if probes is not None:
        sections.append(Section("Probes by label", _probes(probes)))
    return sections


def _reconstruction(report: EvaluationReport) -> ResultTable:
    columns = (
        "dictionary", "FVU", "FVU, uncentred", "cosine", "norm ratio", "relative bias", "L0",
        *(f"L0, {float(share):.0%}" for share in QUANTILES), "worst dimensions",
    )  # fmt: skip
    rows = []
    for name, measured in report.reconstruction.items():
        figures = (measured.fvu, measured.fvu_uncentred, measured.cosine, measured.norm_ratio,
                   measured.relative_bias)  # fmt: skip
        worst = list(measured.worst_dimensions.items())[:3]
        rows.append((
            name,
            *(f"{figure:.4f}" for figure in figures),
            f"{measured.l0:.2f}",
            *(str(measured.l0_quantiles[share]) for share in QUANTILES),
            ", ".join(f"{dimension}: {fvu:.2f}" for dimension, fvu in worst),
        ))
    note = (
        "FVU is centred per dimension over all rows; relative bias below 1: too short; after the "
        "mean L0 its quantiles over rows; worst dimensions: by number, with their FVU"
    )
    return ResultTable(columns, tuple(rows), note)


def _firing(report: EvaluationReport) -> ResultTable:
    first = next(iter(report.firing.values()))
    edges = first.density_edges
    columns = ("dictionary", "latents", "dead", *(f"from {edge:.0e}" for edge in edges[:-1]))
    rows = tuple(
        (name, f"{one.d_sae:,}", f"{one.n_dead:,}", *(f"{n:,}" for n in one.density_histogram))
        for name, one in report.firing.items()
    )
    note = (
        f"latents by the share of {first.n_rows:,} rows in which they fire; dead: in none, so with "
        f"95 % confidence rarer than {first.dead_density_bound:.1e}"
    )
    return ResultTable(columns, rows, note)


def _effects(measured: Substitution) -> ResultTable:
    columns = ("stream", "CE", "Δ CE", "KL", "top-1", "CE rec. (zero)", "CE rec. (mean)")
    streams = {"zero": measured.zero, "mean row": measured.mean, **measured.dictionaries}
    rows = tuple((name, *_cells(effect)) for name, effect in streams.items())
    note = (
        f"CE of the {measured.loss} {_cell(measured.ce_base)} nats as the model is, on "
        f"{measured.n_tokens:,} tokens of {measured.n_contexts} held-out contexts; 95 % intervals "
        "over contexts"
    )
    return ResultTable(columns, rows, note)


def _cells(effect: SubstitutionEffect) -> tuple[str, ...]:
    figures = (effect.ce, effect.ce_increase, effect.kl, effect.top1_agreement,
               effect.ce_recovered_zero, effect.ce_recovered_mean)  # fmt: skip
    return tuple(_cell(figure) for figure in figures)


def _cell(figure: Interval) -> str:
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def _accuracies(accuracies: Downstream) -> list[Section]:
    columns = ("stream", "kNN", "linear", "kNN, change", "linear, change")
    note = (
        f"{accuracies.n_classes} classes, {accuracies.n_train:,} images to fit on, "
        f"{accuracies.n_test:,} held out; "
        "95 % intervals over images, of changes paired"
    )
    sides = {
        "all positions": accuracies.spliced,
        "class token and registers left intact": accuracies.intact,
    }
    return [
        Section(
            f"Accuracy with the stream replaced: {side}",
            ResultTable(columns, tuple((n, *_accuracy(a)) for n, a in measured.items()), note),
        )
        for side, measured in sides.items()
        if measured
    ]


def _accuracy(measured: Accuracy) -> tuple[str, ...]:
    figures = (measured.knn, measured.linear, measured.knn_change, measured.linear_change)
    return tuple(_cell(figure) for figure in figures)


def _probes(probes: Survey) -> ResultTable:
    k = probes.ks[0]
    columns = ("label", *probes.auc, "dense")
    rows = tuple(
        (label, *(_cell(report.arms[name][k].auc) for name in probes.auc), _cell(report.dense.auc))
        for label, report in probes.reports.items()
    )
    return ResultTable(columns, rows, f"AUC of probes of {k} unit, 95 % intervals over examples")


def result_table(run: Run, measured: EvaluationReport, *, with_labels: bool) -> ResultTable:
    """One row per dictionary, the frozen baselines among them."""
    if run.of_images:
        frozen = [name for name in run.dictionaries if run.is_frozen(name)]
        labels = {name: _labels(run, name) for name in run.dictionaries} if with_labels else None
        return image_table(measured, labels, frozen)
    intact = measured.substitution.get("intact")
    columns = ["dictionary", "FVU", "L0", "dead"]
    columns += ["CE rec. (zero)", "CE rec. (mean)", "Δ CE"] if intact else []
    if with_labels:
        columns.append("label AUC")
    rows = []
    for name, of_rows in measured.reconstruction.items():
        dead = measured.firing[name].dead_fraction
        row = [name, f"{of_rows.fvu:.3f}", f"{of_rows.l0:.1f}", f"{dead:.1%}"]
        row += _losses(measured, name) if intact else []
        if with_labels:
            row.append(mean_cell(_labels(run, name)["auc"]))
        rows.append(tuple(row))
    n_rows = next(iter(measured.reconstruction.values())).n_rows
    note = f"{n_rows:,} held-out rows; {_of_model(measured)}"
    if with_labels:
        controls = ", ".join(mean_cell(_labels(run, n)["control_auc"]) for n in run.dictionaries)
        note += f"; AUC of exchanged labels: {controls}"
    return ResultTable(columns=tuple(columns), rows=tuple(rows), note=note)


def _losses(measured: EvaluationReport, name: str) -> list[str]:
    """What the model loses with a dictionary spliced in."""
    spliced = measured.spliced(name)
    effect = spliced.dictionaries[name]
    return [
        f"{effect.ce_recovered_zero.value:.3f}",
        f"{effect.ce_recovered_mean.value:.3f}",
        f"{effect.ce.value - spliced.ce_base.value:+.3f}",
    ]


def _labels(run: Run, name: str) -> dict[str, Any]:
    return read_summary(run.path("explain") / name / SUMMARY)


TRAINING = ("dictionary", "FVU", "L0", "dead", "rows/s", "time")
LAST = 10
"""A figure is the mean over the last tenth of the logged steps: a single batch is noisy."""


def training_table(path: Path) -> ResultTable:
    """One row per dictionary of a training run, from its curves."""
    curves = {name: curve for name, curve in read_curves(path).items() if name}
    n_logged = max((len(curve["rows"]) for curve in curves.values()), default=0)
    n_last = max(n_logged // LAST, 1)
    rows = tuple(training_row(name, curve, n_last) for name, curve in curves.items())
    note = (
        f"FVU, L0 and dead: means of the last {n_last} of {n_logged} logged batches, of rows that "
        "were trained on; rows/s: of this dictionary's steps alone"
    )
    return ResultTable(TRAINING, rows, note)


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


FORMS = (".0%", ".3f", ".3f", ".3f", ".0%")
"""Of the figures of a check."""
SHOWN_PAIRS = 6
"""So many pairs have every figure on the screen; of more, the file and the picture hold them."""


def pairs_table(
    pairs: Mapping[tuple[str, str], Mapping[str, Similarity]], n_rows: int, notes: Sequence[str]
) -> ResultTable:
    """A row for each measure of each of the first pairs."""
    columns = ("a", "b", "measure", "value", "95 %", "chance", "p")
    shown = list(pairs.items())[:SHOWN_PAIRS]
    rows = [
        (
            *pair,
            measure,
            f"{one.value:.3f}",
            f"{one.low:.3f}..{one.high:.3f}",
            f"{one.chance:.3f}..{one.chance_high:.3f}",
            f"{one.p:.3f}",
        )
        for pair, by_measure in shown
        for measure, one in by_measure.items()
    ]
    note = (
        f"{n_rows:,} rows; larger is more alike (procrustes: 1 - half the distance; pwcca weighs "
        "by a; stitching: R^2 of an affine map from a to b on examples it was not fitted on; the "
        "searches: share of rows of a whose partner is among the nearest of b); 95 %: bootstrap "
        "over examples, to first order; chance: mean and 95 % quantile with the rows of b "
        "exchanged; p: the share of exchanges that reach the value"
    )
    if len(pairs) > len(shown):
        note += f"; the first {len(shown)} of {len(pairs):,} pairs"
    return ResultTable(columns, tuple(rows), "; ".join([note, *notes]))


def shapes_table(shapes: Mapping[str, RowsShape], constant: Mapping[str, int]) -> ResultTable:
    """A row for each set of rows."""
    columns = ("rows of", "width", "RankMe", "dimension", "kurtosis", "outliers")
    rows = [
        (
            name,
            f"{one.width:,}" + (f" (+{constant[name]:,} constant)" if constant[name] else ""),
            f"{one.rankme:.1f}",
            _or_dash(one.dimension, ".1f"),
            f"{one.kurtosis:.2f}",
            "-" if one.outliers is None else str(one.outliers),
        )
        for name, one in shapes.items()
    ]
    note = (
        "RankMe: effective rank of the rows as they are; dimension: TwoNN; kurtosis: median over "
        "columns, 3 for a Gaussian; outliers: columns of 6 times the median root mean square"
    )
    return ResultTable(columns, tuple(rows), note)


def signatures_table(signatures: Mapping[str, Signature]) -> ResultTable:
    """A row for each set of rows."""
    columns = ("rows of", "unique", "per direction", "all", "without smallest", "without largest")
    rows = []
    for name, one in signatures.items():
        whole, part = one.accuracy[0.0], one.accuracy[0.9]
        shares = (f"{share:.2f}" for share in (whole.smallest, part.smallest, part.largest))
        of_concepts = f"{one.unique} of {one.n_concepts}"
        rows.append((name, of_concepts, _or_dash(one.per_direction, ".1f"), *shares))
    floor = next(iter(signatures.values())).floor
    note = (
        "unique: concepts that are the best one of a principal direction, at an average precision "
        "of .9; then how often the concept is told, with all directions and without nine tenths "
        f"of them: chance {floor:.2f}"
    )
    return ResultTable(columns, tuple(rows), note)


def check_table(checks: Mapping[str, MeasureCheck]) -> ResultTable:
    """A row for each measure."""
    columns = ("measure", "removable", "without the first", "order", "p", "same layer")
    rows = [
        (measure, *(_or_dash(figure, form) for figure, form in zip(one, FORMS, strict=True)))
        for measure, one in checks.items()
    ]
    note = (
        "removable: share of the principal components, smallest first, without which a set is "
        "still as like itself as the nearest other set is: near 100 % a measure sees the largest "
        "alone; without the first: a set against itself without its largest component; order: "
        "Spearman with nearness of layers, p by exchanged layers; same layer: share of layers "
        "whose most alike one in another cache has the same depth"
    )
    return ResultTable(columns, tuple(rows), note)


def stitched_table(places: Sequence[tuple[str, str, Substitution]]) -> ResultTable:
    """A row for each pair of places: the increase of the cross-entropy, beside its controls."""
    streams = ("stitched", "identity", "exchanged rows")
    columns = ("from", "into", "stitched", "KL", "identity", "exchanged rows", "mean row")
    rows = []
    for a, b, effects in places:
        of = {name: _cell(one.ce_increase) for name, one in effects.dictionaries.items()}
        first, *controls = (of.get(name, "-") for name in streams)
        kl = _cell(effects.dictionaries["stitched"].kl)
        rows.append((a, b, first, kl, *controls, _cell(effects.mean.ce_increase)))
    effects = places[0][2]
    note = (
        f"nats per token above the cross-entropy of the model as it is ({_cell(effects.ce_base)} "
        f"for the first) when the mapped stream takes the other's place, on {effects.n_tokens:,} "
        f"tokens of {effects.n_contexts} held-out contexts; maps are fitted on other rows; "
        "identity: the stream as it is; exchanged rows: a map fitted on wrong pairs; mean row: no "
        "stream at all"
    )
    return ResultTable(columns, tuple(rows), note)


def _or_dash(figure: float, form: str) -> str:
    return "-" if math.isnan(figure) else format(figure, form)
