"""The results of dictionaries of images as one table."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from sae.browser import ResultTable
from sae.cli import console
from sae.cli.image_runs import frozen_of, rival_of, verdict
from sae.evaluate.downstream import AS_IT_IS, Downstream
from sae.evaluate.report import EvaluationReport
from sae.explain.scores import Mean
from sae.explain.vision.run import ExplainedImages
from sae.statistics import Interval
from sae.statistics import Interval as Share

COLUMNS = ("dictionary", "FVU", "L0", "dead", "kNN kept", "linear kept")
SHOWN = {AS_IT_IS: "model as it is", "mean": "mean row instead"}
ARMS = {"random directions": "random as", "raw neurons": "neurons as"}
LABEL_COLUMNS = ("label AUC", "beat null", "best of class")


def image_table(
    report: EvaluationReport,
    labels: Mapping[str, dict[str, Any]] | None = None,
    frozen: list[str] | None = None,
) -> ResultTable:
    """One row per dictionary, the model as it is and its ablation above them.

    Args:
        report: With or without accuracies.
        labels: What summary.json says of the labels, by dictionary; no such columns when absent.
        frozen: Which of the dictionaries are frozen baselines.
    """
    told = report.downstream
    columns = COLUMNS if labels is None else (*COLUMNS, *LABEL_COLUMNS)
    above = SHOWN if told else {}
    rows: list[tuple[str, ...]] = [
        (above[name], "-", "-", "-", *_accuracies(told, name)) for name in above
    ]
    for name, found in report.reconstruction.items():
        dead = f"{report.firing[name].dead_fraction:.1%}"
        own = (name, f"{found.fvu:.3f}", f"{found.l0:.1f}", dead)
        rows.append((*own, *_accuracies(told, name)))
    if labels is None:
        return ResultTable(columns, tuple(rows), _note(report))
    rows = [(*row, *_label_cells(labels.get(row[0]))) for row in rows]
    for name, summary in labels.items():
        if name in (frozen or ()):
            continue
        for arm, found in summary["baselines"].items():
            rows.append((f"{ARMS[arm]} {name}", *("-" * 5), *_label_cells(found)))
    note = "\n".join((_note(report), _label_note(labels), *_verdicts(labels, frozen or [])))
    return ResultTable(columns, tuple(rows), note)


def _accuracies(told: Downstream | None, name: str) -> tuple[str, ...]:
    """Of the model as it is the accuracies, of others the share of them that is kept."""
    if told is None or name not in told.spliced:
        return ("-",) * 2
    found, base = told.spliced[name], told.spliced[AS_IT_IS]
    if name == AS_IT_IS:
        return (f"{base.knn.value:.3f}", f"{base.linear.value:.3f}")
    return (_kept(found.knn, base.knn), _kept(found.linear, base.linear))


def _kept(own: Interval, of_model: Interval) -> str:
    return f"{own.value / of_model.value:.0%}" if of_model.value else "-"


def _label_cells(summary: dict[str, Any] | None) -> tuple[str, ...]:
    if summary is None:
        return ("-",) * len(LABEL_COLUMNS)
    share = summary["beats_null"]
    if share["value"] is None:
        return ("-",) * len(LABEL_COLUMNS)
    beat = f"{share['value']:.{0 if share['value'] >= 0.1 else 1}%}"
    best = summary["best_of_class"]["mean"]
    return (_mean(summary["auc"]), beat, "-" if best is None else f"{best:.3f}")


def _mean(found: dict[str, float | None]) -> str:
    mean, low, high = (found[key] for key in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return "-"
    return f"{mean:.3f} ±{(high - low) / 2:.3f}"


def _note(report: EvaluationReport) -> str:
    n_rows = next(iter(report.reconstruction.values())).n_rows
    note = f"{n_rows:,} held-out rows"
    told = report.downstream
    if told is None:
        return f"{note}; accuracies need the model, and images of two classes"
    half = max((a.knn.high - a.knn.low) / 2 for a in told.spliced.values())
    note += (
        f"; kept: of what tells {told.n_classes} classes from the pooled output of {told.n_test:,} "
        f"held-out images (accuracies ±{half:.3f} or less), the stream replaced at all positions"
    )
    if told.intact:
        knn = told.intact["mean"].knn.value / max(told.intact[AS_IT_IS].knn.value, 1e-9)
        note += f"; with the class token left intact the mean row alone keeps {knn:.0%} of kNN"
    return note


def _label_note(labels: Mapping[str, dict[str, Any]]) -> str:
    first = next(iter(labels.values()))
    void = max(found["beats_null_shuffled"]["value"] or 0.0 for found in labels.values())
    controls = [found["control_auc"]["mean"] for found in labels.values()]
    exchanged = max((c for c in controls if c is not None), default=math.nan)
    return (
        f"labels: classes and groups of folders, scored on {first['n_images_score']:,} images they "
        "were not made from; beat null: share of the live latents whose AUC beats permuted classes "
        f"at 1 % ({void:.1%} or less with exchanged folders); best of class: AUC of each class's "
        "best latent; strongest pictures: how much oftener a latent's 5 strongest have its label "
        "than all do; random, neurons: untrained, as dense as that dictionary; AUC of other "
        f"latents' labels: {exchanged:.3f} or less"
    )


def _verdicts(labels: Mapping[str, dict[str, Any]], frozen: list[str]) -> Iterator[str]:
    """A line for each trained dictionary."""
    for name in labels:
        partner = None if name in frozen else frozen_of(name, frozen)
        if partner is None:
            continue
        rival = rival_of(labels[name], labels[partner])
        share = Share(*(100 * end for end in rival.share))
        others = {"label AUC": rival.auc, "strongest pictures": rival.strongest}
        told = (
            f"{what} {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}], it {verdict(d)}"
            for what, d in others.items()
        )
        yield (
            f"{name} against {partner}: beat null {share.value:+.1f} points [{share.low:+.1f}, "
            f"{share.high:+.1f}], it {verdict(rival.share)}; {'; '.join(told)}"
        )


def show_image_labels(title: str, found: ExplainedImages) -> None:
    """Print what came of the labels of one dictionary, failures first."""
    arms = {"its latents": found.summary, **found.untrained}
    rows = [
        (
            name,
            f"{arm.n_insufficient:,}",
            f"{arm.n_unlabelled:,}",
            f"{arm.n_scored:,}",
            _with_ends(arm.beats_null),
            _with_ends(arm.auc),
            _with_ends(arm.best_of_class),
            _with_ends(arm.control_auc),
        )
        for name, arm in arms.items()
    ]
    columns = (
        "", "insufficient", "unlabelled", "scored", "beat null", "AUC", "best per class",
        "exchanged",
    )  # fmt: skip
    own = found.summary
    note = (
        f"{own.n_latents:,} latents, {own.n_dead:,} dead; labels are classes and groups of "
        f"folders, scored on {own.n_images_score:,} other images; beat null: share of the live "
        "latents whose AUC beats permuted classes at 1 %; the untrained ones are as dense; chance "
        "is 0.5"
    )
    console.table(title, columns, rows, note)


def _with_ends(found: Share | Mean) -> str:
    return f"{found[0]:.3f} ±{(found.high - found.low) / 2:.3f}"
