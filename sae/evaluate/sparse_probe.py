"""k-sparse probing: how well k units of a representation tell a label, beside what others tell.

k-sparse probing of a cache's most frequent labels, averaged over them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression

from activations_cache.checks import Progress, silent
from activations_cache.reader import ActivationCache
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.geometry import inherent_interpretability
from sae.evaluate.probe_tasks import (
    Arm,
    RowLabels,
    Task,
    Units,
    check_two_classes,
    columns,
    common_labels,
    default_arms,
    mean_difference,
    task_of,
)
from sae.statistics import Interval

KS = (1, 2, 5)
"""Numbers of units, as in SAEBench and sae-probes."""

CS = (1e-3, 1e-2, 1e-1, 1.0, 1e1)
"""Inverse strengths of regularisation that are tried on a part of the rows to fit on."""

VALIDATION = 5
"""One row of so many is kept to choose the strength."""

N_RESAMPLES = 300
"""Bootstrap resamples of the groups."""


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """One probe on rows that it was not fitted to."""

    auc: Interval
    """Area under the ROC curve, chance 0.5, with a 95 % interval over groups."""
    accuracy: float
    """At probability 1/2; the larger class's share is its floor."""
    f1: float
    """At probability 1/2, of the positive class."""
    units: tuple[int, ...]
    """Which it reads; empty for all of them."""


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """All arms on one label."""

    n_train: int
    """Rows that probes were fitted to."""
    n_test: int
    """Rows that they were scored on."""
    base_rate: float
    """Share of positive rows among the latter."""
    dense: ProbeScore
    """A probe of the whole stream: what can be told at all, linearly."""
    arms: dict[str, dict[int, ProbeScore]]
    """By arm and number of units."""
    control: dict[str, dict[int, float]]
    """AUC on control labels, by arm and number of units: what it should not reach."""
    control_task: dict[str, dict[int, float]]
    """AUC where each token has a label drawn at random, on tokens that were fitted on: what can be
    learned by heart. By arm and number of units; empty where rows have no types."""
    dense_control_task: float | None = None
    """The same of the probe of the whole stream."""

    def selectivity(self, arm: str, k: int) -> float:
        """AUC above that of the control task (Hewitt and Liang 2019, arXiv 1909.03368).

        Without types, above that on control labels.
        """
        return self.arms[arm][k].auc.value - (self.control_task or self.control)[arm][k]

    def interpretability(self, arm: str, n_units: int) -> float:
        """Mean over sparsity of accuracy over that of the dense probe: the IIS of an arm.

        Args:
            arm: One of several numbers of units.
            n_units: How many units the arm has; a probe of k leaves 1 - k / n_units of them out.
        """
        points = sorted((1 - k / n_units, score.accuracy) for k, score in self.arms[arm].items())
        sparsity, accuracy = zip(*points, strict=True)
        area = inherent_interpretability(sparsity, accuracy, self.dense.accuracy)
        return area / (sparsity[-1] - sparsity[0])


def probe(
    task: Task, arms: Mapping[str, Arm], *, ks: Sequence[int] = KS, seed: int = 0
) -> ProbeReport:
    """Fit probes on k units of each arm, on the whole stream, and on control labels.

    The units are those of the largest |mean difference| between the classes of the rows to fit on,
    scaled to unit variance; the probe is a logistic regression whose strength of regularisation is
    chosen on a fifth of these rows (the form of sae-probes; Gurnee et al. 2023, arXiv 2305.01610).
    Control labels are the labels of other rows. A control task gives each type of row, such as its
    token, a label at random, which a probe can only know by heart.

    Args:
        task: Rows and labels.
        arms: By name; see `sae.evaluate.probe_tasks`.
        ks: Numbers of units.
        seed: Decides the control labels and the resamples.

    Raises:
        ValueError: If labels have one class, or there is no row.
    """
    for y, what in ((task.train_y, "labels to fit on"), (task.test_y, "labels to score on")):
        check_two_classes(y, what)
    generator = np.random.default_rng(seed)
    shuffled = task._replace(
        train_y=generator.permutation(task.train_y), test_y=generator.permutation(task.test_y)
    )
    by_heart = _control_task(task, generator)
    scores: dict[str, dict[int, ProbeScore]] = {}
    control: dict[str, dict[int, float]] = {}
    control_task: dict[str, dict[int, float]] = {}
    for name, arm in arms.items():
        train, test = arm(task.train_x), arm(task.test_x)
        scores[name] = {k: _sparse(train, test, task, k, seed) for k in ks}
        control[name] = {k: _sparse(train, test, shuffled, k, seed).auc.value for k in ks}
        if by_heart is not None:
            scored, other = by_heart
            some = test[scored]
            control_task[name] = {k: _sparse(train, some, other, k, seed).auc.value for k in ks}
    whole = task.train_x.float().cpu().numpy(), task.test_x.float().cpu().numpy()
    return ProbeReport(
        n_train=len(task.train_y),
        n_test=len(task.test_y),
        base_rate=float(task.test_y.mean()),
        dense=fit_and_score(*whole, task, seed=seed),
        arms=scores,
        control=control,
        control_task=control_task,
        dense_control_task=None
        if by_heart is None
        else fit_and_score(whole[0], whole[1][by_heart[0]], by_heart[1], seed=seed).auc.value,
    )


def _control_task(
    task: Task, generator: np.random.Generator
) -> tuple[Int[np.ndarray, " some"], Task] | None:
    """The rows to score on whose type was fitted on, and the task with a label for each type."""
    if task.types is None:
        return None
    known, place = np.unique(task.types[0], return_inverse=True)
    label = generator.random(len(known)) < task.train_y.mean()
    seen = np.flatnonzero(np.isin(task.types[1], known))
    test_y = label[np.searchsorted(known, task.types[1][seen])]
    train_y = label[place]
    if len({*train_y.tolist()}) < 2 or len({*test_y.tolist()}) < 2:
        return None  # too few types to say anything
    group = task.test_group[seen]
    return seen, task._replace(train_y=train_y, test_y=test_y, test_group=group)


def _sparse(train: Units, test: Units, task: Task, k: int, seed: int) -> ProbeScore:
    contrast = np.abs(mean_difference(train, task.train_y))
    chosen = np.argsort(-contrast, kind="stable")[:k]
    return fit_and_score(
        columns(train, chosen), columns(test, chosen), task, units=chosen, seed=seed
    )


def fit_and_score(
    train: Float[np.ndarray, "row k"],
    test: Float[np.ndarray, "other k"],
    task: Task,
    *,
    units: Int[np.ndarray, " k"] | None = None,
    seed: int = 0,
) -> ProbeScore:
    """Fit a regularised logistic regression and score it."""
    scale = train.std(axis=0)
    scale[scale == 0] = 1
    mean = train.mean(axis=0)
    model = _fit((train - mean) / scale, task.train_y)
    logit = model.decision_function((test - mean) / scale)
    called, y = logit > 0, task.test_y
    return ProbeScore(
        auc=auc_interval(logit, y, task.test_group, seed),
        accuracy=float((called == y).mean()),
        f1=float(2 * (called & y).sum() / max(1, called.sum() + y.sum())),
        units=() if units is None else tuple(units.tolist()),
    )


def _fit(x: Float[np.ndarray, "row k"], y: Bool[np.ndarray, " row"]) -> LogisticRegression:
    held = np.arange(len(y)) % VALIDATION == 0
    results = []
    for c in CS:
        if len(set(y[held])) < 2 or len(set(y[~held])) < 2:
            results = [(0.0, 1.0)]  # too few rows to choose on
            break
        model = LogisticRegression(C=c, max_iter=1000).fit(x[~held], y[~held])
        results.append((auc(model.decision_function(x[held]), y[held]), c))
    return LogisticRegression(C=max(results)[1], max_iter=1000).fit(x, y)


def auc(score: Float[np.ndarray, " row"], y: Bool[np.ndarray, " row"]) -> float:
    """Chance that a positive row scores above a negative one, ties counting half; else nan."""
    return float(_weighted_auc(score, y, np.ones((1, len(y))))[0])


def auc_interval(
    score: Float[np.ndarray, " row"],
    y: Bool[np.ndarray, " row"],
    group: Int[np.ndarray, " row"],
    seed: int,
) -> Interval:
    """The AUC with its bootstrap interval over whole groups."""
    names, member = np.unique(group, return_inverse=True)
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), N_RESAMPLES)
    result = _weighted_auc(score, y, counts[:, member].astype(float))
    defined = result[~np.isnan(result)]
    low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) else (np.nan, np.nan)
    return Interval(value=auc(score, y), low=float(low), high=float(high))


def _weighted_auc(
    score: Float[np.ndarray, " row"],
    y: Bool[np.ndarray, " row"],
    weight: Float[np.ndarray, "batch row"],
) -> Float[np.ndarray, " batch"]:
    """The AUC under several weightings of the rows."""
    order = np.argsort(score, kind="stable")
    first = np.flatnonzero(np.diff(score[order], prepend=-np.inf))  # of each run of ties
    weight, y = weight[:, order], y[order]
    true = np.add.reduceat(weight * y, first, axis=1)
    false = np.add.reduceat(weight * ~y, first, axis=1)
    below = false.cumsum(axis=1) - false / 2
    pairs = true.sum(axis=1) * false.sum(axis=1)
    return np.divide((true * below).sum(axis=1), pairs, out=np.full(len(weight), np.nan),
                     where=pairs > 0)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Means over labels; `reports` has the figures and intervals of each."""

    labels: tuple[str, ...]
    """Which labels."""
    ks: tuple[int, ...]
    """Numbers of units that probes read."""
    auc: dict[str, tuple[float, ...]]
    """By arm, for each of `ks`."""
    f1: dict[str, tuple[float, ...]]
    """By arm, for each of `ks`."""
    control: dict[str, float]
    """By arm: AUC on control labels with the largest k."""
    control_task: dict[str, float]
    """By arm: AUC of the control task with the largest k; of arms with none left out."""
    dense_control_task: float | None
    """The same of probes of the whole stream."""
    dense: float
    """AUC of probes of the whole stream."""
    reports: dict[str, ProbeReport]
    """By label."""


def survey(
    dictionaries: Mapping[str, SparseAutoencoder],
    l0: Mapping[str, float],
    cache: ActivationCache,
    hook_point: str,
    n_labels: int,
    *,
    labels: RowLabels | None = None,
    progress: Progress | None = None,
) -> Survey:
    """Probe the labels with the most rows.

    Args:
        dictionaries: By name.
        l0: Of each, by the same names.
        cache: With labels.
        hook_point: Which rows.
        n_labels: How many labels.
        labels: Other labels than the cache's own.
        progress: Called with the unit "labels".

    Raises:
        ValueError: If the cache has no two labels with enough rows.
    """
    chosen = common_labels(cache, labels=labels)[:n_labels]
    reports = {}
    for done, label in enumerate(chosen, start=1):
        arms = default_arms(dictionaries, l0, torch.Generator().manual_seed(0))
        reports[label] = probe(task_of(cache, hook_point, label, labels=labels), arms)
        (progress or silent)(done, len(chosen), "labels")
    results = list(reports.values())
    names = list(results[0].arms)

    by_heart = [r.dense_control_task for r in results if r.dense_control_task is not None]

    def mean(figures: list[float]) -> float:
        return sum(figures) / len(figures)

    return Survey(
        labels=chosen,
        ks=KS,
        auc={n: tuple(mean([r.arms[n][k].auc.value for r in results]) for k in KS) for n in names},
        f1={n: tuple(mean([r.arms[n][k].f1 for r in results]) for k in KS) for n in names},
        control={n: mean([r.control[n][KS[-1]] for r in results]) for n in names},
        control_task={
            n: mean(known)
            for n in names
            if (known := [r.control_task[n][KS[-1]] for r in results if n in r.control_task])
        },
        dense_control_task=mean(by_heart) if by_heart else None,
        dense=mean([r.dense.auc.value for r in results]),
        reports=reports,
    )
