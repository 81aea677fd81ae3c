"""The results of a run as a table."""

import json
from typing import TYPE_CHECKING, Any

from sae.browser import ResultTable
from sae.cli.image_table import image_table
from sae.evaluate.report import EvaluationReport
from sae.explain.tables import SUMMARY

if TYPE_CHECKING:
    from sae.cli.chain import Run


def result_table(run: "Run", measured: EvaluationReport, *, with_labels: bool) -> ResultTable:
    """One row per dictionary, the frozen baselines among them."""
    if run.of_images:
        frozen = [name for name in run.dictionaries if run.is_frozen(name)]
        labels = {name: _labels(run, name) for name in run.dictionaries} if with_labels else None
        return image_table(measured, labels, frozen)
    columns = ["dictionary", "FVU", "L0", "dead", "CE rec. (zero)", "CE rec. (mean)", "Δ CE"]
    if with_labels:
        columns.append("label AUC")
    intact = measured.substitution["intact"]
    rows = []
    for name, found in measured.reconstruction.items():
        spliced = measured.spliced(name)
        effect = spliced.dictionaries[name]
        row = [
            name,
            f"{found.fvu:.3f}",
            f"{found.l0:.1f}",
            f"{measured.firing[name].dead_fraction:.1%}",
            f"{effect.ce_recovered_zero.value:.3f}",
            f"{effect.ce_recovered_mean.value:.3f}",
            f"{effect.ce.value - spliced.ce_base.value:+.3f}",
        ]
        if with_labels:
            row.append(_mean(_labels(run, name)["auc"]))
        rows.append(tuple(row))
    n_rows = next(iter(measured.reconstruction.values())).n_rows
    note = (
        f"{n_rows:,} held-out rows; CE {intact.ce_base.value:.3f} nats on {intact.n_tokens:,} "
        f"held-out tokens, positions below {measured.skip_positions} left intact"
    )
    if with_labels:
        controls = ", ".join(_mean(_labels(run, n)["control_auc"]) for n in run.dictionaries)
        note += f"; AUC of exchanged labels: {controls}"
    return ResultTable(columns=tuple(columns), rows=tuple(rows), note=note)


def _labels(run: "Run", name: str) -> dict[str, Any]:
    return json.loads((run.path("explain") / name / SUMMARY).read_text())


def _mean(found: dict[str, float | None]) -> str:
    mean, low, high = (found[key] for key in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return "-"
    return f"{mean:.3f} ±{(high - low) / 2:.3f}"
