"""What an evaluation found as titled tables, for the terminal and for its page."""

from typing import NamedTuple

from sae.browser import ResultTable
from sae.evaluate.downstream import Accuracy, Downstream
from sae.evaluate.probing.sparse_probe import Survey
from sae.evaluate.report import EvaluationReport
from sae.evaluate.substitution import Effect, Substitution
from sae.statistics import Interval

COLUMNS = ("dictionary", "L0", "FVU", "dead", "CE rec. (zero)", "CE rec. (mean)", "Δ CE", "KL",
           "top-1")  # fmt: skip

QUANTILES = ("0.05", "0.5", "0.95")
"""Of a row's L0, on the page; the JSON has more."""


class Section(NamedTuple):
    """A titled table."""

    title: str
    table: ResultTable


def text_table(report: EvaluationReport) -> ResultTable:
    """A row for each dictionary and baseline on a cache of text."""
    rows = []
    intact = report.substitution.get("intact")
    for name, found in report.reconstruction.items():
        row = [name, f"{found.l0:.1f}", f"{found.fvu:.3f}"]
        row.append(f"{report.firing[name].dead_fraction:.1%}")
        if intact is None:
            rows.append((*row, *("-" for _ in COLUMNS[len(row) :])))
            continue
        effect = intact.dictionaries[name]
        figures = (effect.ce_recovered_zero, effect.ce_recovered_mean, effect.ce_increase,
                   effect.kl, effect.top1_agreement)  # fmt: skip
        rows.append((*row, *(f"{figure.value:.3f}" for figure in figures)))
    return ResultTable(COLUMNS, tuple(rows), _note(report))


def _note(report: EvaluationReport) -> str:
    """What the table's figures rest on."""
    name = next(iter(report.reconstruction))
    firing = report.firing[name]
    note = (
        f"{report.reconstruction[name].n_rows:,} held-out rows; dead: silent in {firing.n_rows:,} "
        f"rows, so with 95 % confidence rarer than {firing.dead_density_bound:.1e}"
    )
    intact = report.substitution.get("intact")
    if intact is None:
        return note
    return (
        f"{note}; CE {intact.ce_base.value:.3f} nats on {intact.n_tokens:,} held-out tokens, "
        f"positions below {report.skip_positions} left intact"
    )


def probe_table(probes: Survey) -> ResultTable:
    """Mean AUCs over the labels."""
    columns = ("probe", *(f"AUC, k={k}" for k in probes.ks), "control")
    rows = [
        (name, *(f"{value:.3f}" for value in probes.auc[name]), f"{probes.control[name]:.3f}")
        for name in probes.auc
    ]
    rows.append(("dense", *("" for _ in probes.ks[1:]), f"{probes.dense:.3f}", ""))
    return ResultTable(columns, tuple(rows), f"means over {', '.join(probes.labels)}")


def details(report: EvaluationReport, probes: Survey | None) -> list[Section]:
    """What the one table leaves out: every figure with its interval."""
    sections = [
        Section("Reconstruction", _reconstruction(report)),
        Section("Firing", _firing(report)),
    ]
    sections += [
        Section(f"The model with the stream replaced, special positions {kind}", _effects(found))
        for kind, found in report.substitution.items()
    ]
    if report.downstream is not None:
        sections += _accuracies(report.downstream)
    if probes is not None:
        sections.append(Section("Probes by label", _labels(probes)))
    return sections


def _reconstruction(report: EvaluationReport) -> ResultTable:
    columns = (
        "dictionary", "FVU", "FVU, uncentred", "cosine", "norm ratio", "relative bias", "L0",
        *(f"L0, {float(share):.0%}" for share in QUANTILES), "worst dimensions",
    )  # fmt: skip
    rows = []
    for name, found in report.reconstruction.items():
        figures = (found.fvu, found.fvu_uncentred, found.cosine, found.norm_ratio,
                   found.relative_bias)  # fmt: skip
        worst = list(found.worst_dimensions.items())[:3]
        rows.append((
            name,
            *(f"{figure:.4f}" for figure in figures),
            f"{found.l0:.2f}",
            *(str(found.l0_quantiles[share]) for share in QUANTILES),
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
        (name, f"{of.d_sae:,}", f"{of.n_dead:,}", *(f"{n:,}" for n in of.density_histogram))
        for name, of in report.firing.items()
    )
    note = (
        f"latents by the share of {first.n_rows:,} rows in which they fire; dead: in none, so with "
        f"95 % confidence rarer than {first.dead_density_bound:.1e}"
    )
    return ResultTable(columns, rows, note)


def _effects(found: Substitution) -> ResultTable:
    columns = ("stream", "CE", "Δ CE", "KL", "top-1", "CE rec. (zero)", "CE rec. (mean)")
    streams = {"zero": found.zero, "mean row": found.mean, **found.dictionaries}
    rows = tuple((name, *_cells(effect)) for name, effect in streams.items())
    note = (
        f"CE {_cell(found.ce_base)} nats as the model is, on {found.n_tokens:,} tokens of "
        f"{found.n_contexts} held-out contexts; 95 % intervals over contexts"
    )
    return ResultTable(columns, rows, note)


def _cells(effect: Effect) -> tuple[str, ...]:
    figures = (effect.ce, effect.ce_increase, effect.kl, effect.top1_agreement,
               effect.ce_recovered_zero, effect.ce_recovered_mean)  # fmt: skip
    return tuple(_cell(figure) for figure in figures)


def _cell(figure: Interval) -> str:
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def _accuracies(told: Downstream) -> list[Section]:
    columns = ("stream", "kNN", "linear", "kNN, change", "linear, change")
    note = (
        f"{told.n_classes} classes, {told.n_train:,} images to fit on, {told.n_test:,} held out; "
        "95 % intervals over images, of changes paired"
    )
    sides = {"all positions": told.spliced, "class token and registers left intact": told.intact}
    return [
        Section(
            f"Accuracy with the stream replaced: {side}",
            ResultTable(columns, tuple((n, *_told(a)) for n, a in found.items()), note),
        )
        for side, found in sides.items()
        if found
    ]


def _told(found: Accuracy) -> tuple[str, ...]:
    figures = (found.knn, found.linear, found.knn_change, found.linear_change)
    return tuple(_cell(figure) for figure in figures)


def _labels(probes: Survey) -> ResultTable:
    k = probes.ks[0]
    columns = ("label", *probes.auc, "dense")
    rows = tuple(
        (label, *(_cell(report.arms[name][k].auc) for name in probes.auc), _cell(report.dense.auc))
        for label, report in probes.reports.items()
    )
    return ResultTable(columns, rows, f"AUC of probes of {k} unit, 95 % intervals over examples")
