"""k-sparse probing of a cache's most frequent labels, averaged over them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from activations_cache.progress import Progress, silent
from activations_cache.reader import ActivationCache
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.probing.labels import common_labels, task_of
from sae.evaluate.probing.sparse_probe import KS, ProbeReport, probe
from sae.evaluate.probing.units import default_arms


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
    progress: Progress | None = None,
) -> Survey:
    """Probe the labels with the most rows.

    Args:
        dictionaries: By name.
        l0: Of each, by the same names.
        cache: With labels.
        hook_point: Which rows.
        n_labels: How many labels.
        progress: Called with the unit "labels".

    Raises:
        ValueError: If the cache has no two labels with enough rows.
    """
    labels = common_labels(cache)[:n_labels]
    reports = {}
    for done, label in enumerate(labels, start=1):
        arms = default_arms(dictionaries, l0, torch.Generator().manual_seed(0))
        reports[label] = probe(task_of(cache, hook_point, label), arms)
        (progress or silent)(done, len(labels), "labels")
    found = list(reports.values())
    names = list(found[0].arms)

    def mean(figures: list[float]) -> float:
        return sum(figures) / len(figures)

    return Survey(
        labels=labels,
        ks=KS,
        auc={n: tuple(mean([r.arms[n][k].auc.value for r in found]) for k in KS) for n in names},
        f1={n: tuple(mean([r.arms[n][k].f1 for r in found]) for k in KS) for n in names},
        control={n: mean([r.control[n][KS[-1]] for r in found]) for n in names},
        dense=mean([r.dense.auc.value for r in found]),
        reports=reports,
    )
