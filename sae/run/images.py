"""Evaluation and labels of image caches, and their results as one table."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from activations_cache import ActivationCache
from activations_cache.checks import Progress
from activations_cache.config import TRAINING_SPLITS
from activations_cache.image_rows import CachedImages
from activations_cache.images import read_images
from activations_cache.vision import LoadedVisionModel
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.evaluate.config import EvaluateConfig
from sae.evaluate.downstream import AS_IT_IS, Downstream, Images, ReplacedStream, downstream
from sae.evaluate.report import EvaluationReport
from sae.explain.config import ExplainConfig
from sae.explain.image_run import Captions, ImageUnits, ImageWords
from sae.explain.image_summary import ExplainedImages, with_interval
from sae.explain.results import LabelFigures
from sae.explain.run import Explained
from sae.explain.scores import Mean
from sae.run.caches import check_splits, classes_of, in_splits
from sae.statistics import Interval, difference


def with_downstream(
    report: EvaluationReport,
    dictionaries: Mapping[str, SparseAutoencoder],
    cache: ActivationCache,
    loaded: LoadedVisionModel,
    config: EvaluateConfig,
    progress: Progress,
) -> EvaluationReport:
    """The report with what classes are still told by, for images of two classes.

    Dictionaries that do not read and predict the one hook point are left out.
    """
    if config.n_images == 0 or len(classes_of(cache)) < 2:
        return report
    check_splits(cache, ("hold",))
    spliced = {
        name: dictionary
        for name, dictionary in dictionaries.items()
        if dictionary.config.hook_points_or(report.hook_point)
        == ((report.hook_point,), (report.hook_point,))
    }
    accuracies = _downstream(spliced, report.hook_point, cache, loaded, config, progress)
    return replace(report, downstream=accuracies)


def _downstream(
    dictionaries: Mapping[str, SparseAutoencoder],
    hook_point: str,
    cache: ActivationCache,
    loaded: LoadedVisionModel,
    config: EvaluateConfig,
    progress: Progress,
) -> Downstream:
    images = CachedImages(cache)
    label = cache.examples.label
    assert label is not None, "images of two classes have labels"
    classes = label[:, 0]
    train = _some(cache, TRAINING_SPLITS, config)
    test = _some(cache, ("hold",), config)
    place = ReplacedStream(
        model=loaded.model,
        hook_point=hook_point,
        mean=cache[hook_point].mean,
        n_intact=cache.manifest.plan.skip_positions,
        options=loaded.reading.options(images.preprocessing.size),
    )
    read = Images(images.pixels, train, classes[train], test, classes[test])
    return downstream(dictionaries, place, read, config, progress=progress)


def _some(
    cache: ActivationCache, splits: tuple[str, ...], config: EvaluateConfig
) -> Int[Tensor, " example"]:
    """At most `n_images` images of these splits that have a class, ascending."""
    assert cache.examples.label is not None, "images of two classes have labels"
    numbers = (in_splits(cache, splits) & (cache.examples.label[:, 0] >= 0)).nonzero().flatten()
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(config.seed))
    return numbers[order[: config.n_images]].sort().values


def pictures_of(
    cache: ActivationCache,
    config: ExplainConfig,
    dictionary: SparseAutoencoder,
    hook_point: str,
    words: ImageWords | Captions | None = None,
) -> ImageUnits:
    """The images of a cache, as a dictionary is explained on them.

    Args:
        cache: Of images.
        config: How.
        dictionary: What is explained.
        hook_point: Which rows it reads.
        words: What `words_of` gives for `config.images`.
    """
    names = [record.name for record in read_images(cache)]
    rows, columns = cache.identity["images"]["grid"]
    rows_read = cache.concatenated(dictionary.config.hook_points_or(hook_point)[0])
    return ImageUnits(rows_read, hook_point, config, names, rows * columns, words)


class Rival(NamedTuple):
    """The labels of a dictionary beside those of a baseline, on the same images."""

    share: Interval
    """Share of live latents that beat their null, less that of the baseline."""
    auc: Interval
    """Mean AUC of the labels, less that of the baseline's."""
    strongest: Interval
    """How much oftener the strongest images have the label than all images do, less the same."""


def verdict(difference: Interval) -> str:
    """In words what a difference to a baseline says, by more than its interval."""
    if math.isnan(difference.low):
        return "cannot be judged"
    if difference.low > 0:
        return "wins"
    return "loses" if difference.high < 0 else "does not win"


def frozen_of(name: str, frozen: list[str]) -> str | None:
    """The frozen entry whose name begins with that of a dictionary, else the first."""
    return next((f for f in frozen if f.startswith(name)), frozen[0] if frozen else None)


def rival_of(trained: dict[str, Any], baseline: dict[str, Any]) -> Rival:
    """What summary.json says of a dictionary against what it says of a baseline."""
    shares = [part["beats_null"] for part in (trained, baseline)]
    means = [part["auc"]["mean"] for part in (trained, baseline)]
    nothing = Interval(math.nan, math.nan, math.nan)
    share = auc = nothing
    if all(one["value"] is not None for one in shares):
        share = difference(*(Interval(**one) for one in shares))
    if None not in means:
        influence = np.array(trained["influence"]) - np.array(baseline["influence"])
        auc = Interval(*with_interval(means[0] - means[1], influence))
    return Rival(share, auc, _strongest(trained, baseline))


def _strongest(trained: dict[str, Any], baseline: dict[str, Any]) -> Interval:
    means = [part["strongest"]["mean"] for part in (trained, baseline)]
    if None in means:
        return Interval(math.nan, math.nan, math.nan)
    value = means[0] - means[1]
    resampled = [np.array(part["strongest_resampled"], float) for part in (trained, baseline)]
    half = 1.96 * float((resampled[0] - resampled[1]).std(ddof=1))
    return Interval(value, value - half, value + half)


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
    accuracies = report.downstream
    columns = COLUMNS if labels is None else (*COLUMNS, *LABEL_COLUMNS)
    above = SHOWN if accuracies else {}
    rows: list[tuple[str, ...]] = [
        (above[name], "-", "-", "-", *_accuracies(accuracies, name)) for name in above
    ]
    for name, measured in report.reconstruction.items():
        dead = f"{report.firing[name].dead_fraction:.1%}"
        cells = (name, f"{measured.fvu:.3f}", f"{measured.l0:.1f}", dead)
        rows.append((*cells, *_accuracies(accuracies, name)))
    if labels is None:
        return ResultTable(columns, tuple(rows), _note(report))
    rows = [(*row, *_label_cells(labels.get(row[0]))) for row in rows]
    for name, summary in labels.items():
        if name in (frozen or ()):
            continue
        for arm, figures in summary["baselines"].items():
            rows.append((f"{ARMS[arm]} {name}", *("-" * 5), *_label_cells(figures)))
    lines = (*_verdicts(labels, frozen or []), *_over_exchanged(labels))
    note = "\n".join((_note(report), _label_note(labels), *lines))
    return ResultTable(columns, tuple(rows), note)


def _accuracies(accuracies: Downstream | None, name: str) -> tuple[str, ...]:
    """Of the model as it is the accuracies, of others the share of them that is kept."""
    if accuracies is None or name not in accuracies.spliced:
        return ("-",) * 2
    spliced, base = accuracies.spliced[name], accuracies.spliced[AS_IT_IS]
    if name == AS_IT_IS:
        return (f"{base.knn.value:.3f}", f"{base.linear.value:.3f}")
    return (_share(spliced.knn, base.knn), _share(spliced.linear, base.linear))


def _share(spliced: Interval, of_model: Interval) -> str:
    return f"{spliced.value / of_model.value:.0%}" if of_model.value else "-"


def _label_cells(summary: dict[str, Any] | None) -> tuple[str, ...]:
    if summary is None:
        return ("-",) * len(LABEL_COLUMNS)
    share = summary["beats_null"]
    if share["value"] is None:
        return ("-",) * len(LABEL_COLUMNS)
    beat = f"{share['value']:.{0 if share['value'] >= 0.1 else 1}%}"
    best = summary["best_of_class"]["mean"]
    return (mean_cell(summary["auc"]), beat, "-" if best is None else f"{best:.3f}")


def mean_cell(figure: dict[str, float | None]) -> str:
    """A mean with half of its interval, as summary.json has them."""
    mean, low, high = (figure[key] for key in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return "-"
    return f"{mean:.3f} ±{(high - low) / 2:.3f}"


def _note(report: EvaluationReport) -> str:
    n_rows = next(iter(report.reconstruction.values())).n_rows
    note = f"{n_rows:,} held-out rows"
    accuracies = report.downstream
    if accuracies is None:
        return f"{note}; accuracies need the model, and images of two classes"
    half = max((a.knn.high - a.knn.low) / 2 for a in accuracies.spliced.values())
    note += (
        f"; kept: of what tells {accuracies.n_classes} classes from the pooled output of "
        f"{accuracies.n_test:,} "
        f"held-out images (accuracies ±{half:.3f} or less), the stream replaced at all positions"
    )
    if accuracies.intact:
        knn = accuracies.intact["mean"].knn.value / max(accuracies.intact[AS_IT_IS].knn.value, 1e-9)
        note += f"; with the class token left intact the mean row alone keeps {knn:.0%} of kNN"
    return note


def _label_note(labels: Mapping[str, dict[str, Any]]) -> str:
    first = next(iter(labels.values()))
    void = max(one["beats_null_shuffled"]["value"] or 0.0 for one in labels.values())
    controls = [one["control_auc"]["mean"] for one in labels.values()]
    exchanged = max((c for c in controls if c is not None), default=math.nan)
    words = first.get("words", {})
    return (
        f"labels: {_said(words)}, scored on {first['n_images_score']:,} images they "
        "were not made from; beat null: share of the live latents whose AUC beats permuted "
        f"{'images' if words else 'classes'} at 1 % ({void:.1%} or less with exchanged "
        f"{'images' if words else 'folders'}); best of class: AUC of each {_each(words)}'s "
        "best latent; strongest pictures: how much oftener a latent's 5 strongest have its label "
        "than all do; random, neurons: untrained, as dense as that dictionary; AUC of other "
        f"latents' labels: {exchanged:.3f} or less"
    )


def _said(words: Mapping[str, Any]) -> str:
    """What the labels are, by what is recorded of the towers."""
    if not words:
        return "classes and groups of folders"
    if "captions" in words:
        return f"{words['n_concepts']:,} words of {words['captions']}"
    return (
        f"{words['n_concepts']:,} words by {words['method'].replace('_', ' ')} of {words['tower']} "
        f"(gap between texts and images {words['modality_gap']:.2f})"
    )


def _each(words: Mapping[str, Any]) -> str:
    return "word" if words else "class"


def _over_exchanged(labels: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each dictionary whose labels are words: their AUC less that of exchanged ones."""
    arms = {"over_exchanged": "", "by_folders_over_exchanged": ", by the folders they name"}
    for name, summary in labels.items():
        known = {said: summary[key] for key, said in arms.items() if "words" in summary}
        parts = (
            f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]{said}"
            for said, one in known.items()
            if one["mean"] is not None
        )
        if line := "; ".join(parts):
            yield f"{name}: AUC of words less that of other latents' words {line}"


def _verdicts(labels: Mapping[str, dict[str, Any]], frozen: list[str]) -> Iterator[str]:
    """A line for each trained dictionary."""
    for name in labels:
        partner = None if name in frozen else frozen_of(name, frozen)
        if partner is None:
            continue
        rival = rival_of(labels[name], labels[partner])
        share = Interval(*(100 * end for end in rival.share))
        others = {"label AUC": rival.auc, "strongest pictures": rival.strongest}
        accuracies = (
            f"{what} {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}], it {verdict(d)}"
            for what, d in others.items()
        )
        yield (
            f"{name} against {partner}: beat null {share.value:+.1f} points [{share.low:+.1f}, "
            f"{share.high:+.1f}], it {verdict(rival.share)}; {'; '.join(accuracies)}"
        )


def image_label_table(labelled: ExplainedImages) -> ResultTable:
    """What came of the labels of one dictionary, failures first."""
    summary, words = labelled.summary, labelled.words
    columns = {
        "insufficient": "n_insufficient", "unlabelled": "n_unlabelled", "scored": "n_scored",
        "beat null": "beats_null", "AUC": "auc", f"best per {_each(words)}": "best_of_class",
        "exchanged": "control_auc", "over exchanged": "over_exchanged",
        **({"the same by folders": "by_folders_over_exchanged"} if words else {}),
    }  # fmt: skip
    note = (
        f"{summary.n_latents:,} latents, {summary.n_dead:,} dead; labels are "
        f"{_said(words)}, scored on {summary.n_images_score:,} other images; beat null: "
        f"share of the live latents whose AUC beats permuted "
        f"{'images' if words else 'classes'} at 1 %; the untrained ones are as dense; "
        "chance is 0.5; over exchanged: AUC less that with other latents' labels"
    )
    return arms_table(labelled, columns, note)


def arms_table(labelled: Explained, columns: Mapping[str, str], note: str) -> ResultTable:
    """A row for a dictionary's latents and one for each baseline.

    Args:
        labelled: The labels of the dictionary.
        columns: Title -> which figure of a summary.
        note: What stands below.
    """
    arms = {"its latents": labelled.summary, **labelled.baselines}
    rows = tuple(
        (name, *(_figure_cell(arm, figure) for figure in columns.values()))
        for name, arm in arms.items()
    )
    return ResultTable(("", *columns), rows, note)


def _figure_cell(arm: LabelFigures, name: str) -> str:
    figure, sign = getattr(arm, name), "+" if name.endswith("over_exchanged") else ""
    return f"{figure:,}" if isinstance(figure, int) else with_ends(figure, sign)


def with_ends(figure: Interval | Mean, sign: str = "") -> str:
    """A figure with half of its interval."""
    return f"{figure[0]:{sign}.3f} ±{(figure.high - figure.low) / 2:.3f}"
