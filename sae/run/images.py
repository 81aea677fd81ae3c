"""Evaluation and labels of image caches, for the chain of steps and for the single commands."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from activations_cache import ActivationCache
from activations_cache.checks import MonosemaError, Progress
from activations_cache.config import SPLITS, TRAINING_SPLITS
from activations_cache.image_rows import CachedImages
from activations_cache.images import read_images
from activations_cache.vision import LoadedVisionModel
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.config import EvaluateConfig
from sae.evaluate.downstream import Downstream, Images, Place, downstream
from sae.evaluate.report import EvaluationReport
from sae.explain.config import ExplainConfig
from sae.explain.vision.concepts import concepts_of
from sae.explain.vision.held_out import with_interval
from sae.explain.vision.run import ExplainedImages, Pictures, explain_images
from sae.run.context import holds_images
from sae.statistics import Interval, difference


def check_splits(cache: ActivationCache, splits: tuple[str, ...]) -> None:
    """Refuse splits that nothing can be measured on, before anything slow begins.

    Raises:
        ValueError: If one is empty, or its images are of fewer than two classes.
    """
    kind = "images" if holds_images(cache) else "text"
    if kind == "images":
        concepts_of(_present(cache), None)
    for split in splits:
        advice = f"give it a larger share in cache.{kind}, or add {kind}"
        if not _in(cache, (split,)).any():
            raise MonosemaError(f"the split {split} must hold {kind}, got none; {advice}")
        present = _present(cache, (split,))
        if kind == "images" and len(present) < 2:
            raise MonosemaError(
                f"images of the split {split} must be of two classes or more, got "
                f"{', '.join(present) or 'none'}; {advice}"
            )


def _present(cache: ActivationCache, splits: tuple[str, ...] = SPLITS) -> tuple[str, ...]:
    """Names of the classes of these splits."""
    label = cache.examples.label
    if label is None:
        return ()
    numbers = label[_in(cache, splits), 0].unique().tolist()
    return tuple(cache.label_names[i] for i in numbers if i >= 0)


def _in(cache: ActivationCache, splits: tuple[str, ...]) -> Bool[Tensor, " example"]:
    wanted = torch.tensor([SPLITS.index(name) for name in splits])
    return torch.isin(cache.examples.split, wanted)


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
    if config.n_images == 0 or len(_present(cache)) < 2:
        return report
    check_splits(cache, ("hold",))
    spliced = {
        name: dictionary
        for name, dictionary in dictionaries.items()
        if dictionary.config.sites(report.hook_point)
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
    place = Place(
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
    numbers = (_in(cache, splits) & (cache.examples.label[:, 0] >= 0)).nonzero().flatten()
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(config.seed))
    return numbers[order[: config.n_images]].sort().values


def explain_pictures(
    dictionary: SparseAutoencoder,
    cache: ActivationCache,
    hook_point: str,
    config: ExplainConfig,
    path: Path | None,
    report: Progress,
) -> ExplainedImages:
    """Label a dictionary's latents by the classes of a cache's images; write into a directory.

    Raises:
        ValueError: If the images have fewer than two classes.
    """
    names = [record.name for record in read_images(cache)]
    rows, columns = cache.identity["images"]["grid"]
    pictures = Pictures(
        cache.concatenated(dictionary.config.sites(hook_point)[0]), names, rows * columns
    )
    return explain_images(dictionary, pictures, hook_point, config, path, progress=report)


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
