"""Tasks from a labelled cache: tokens of a gloss, images of a class, rows of any labelled text."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from activations_cache.reader import ActivationCache
from sae.evaluate.probing.units import Task, check_two_classes

LEAST = 20
"""Positive rows on either side below which a label is left out of a survey."""


def task_of(
    cache: ActivationCache,
    hook_point: str,
    label: str,
    *,
    n_train: int = 4000,
    n_test: int = 1000,
    seed: int = 0,
) -> Task:
    """Rows of a label and as many of other labels: fitted on `explain`, scored on the other splits.

    Splits are made of documents, so no document is on both sides.

    Args:
        cache: A cache whose text or images have labels.
        hook_point: Which rows.
        label: One of `cache.label_names`; rows without any label are left out.
        n_train: At most so many rows to fit on, half of them positive.
        n_test: At most so many to score on.
        seed: Decides which rows.

    Raises:
        ValueError: If the cache has no labels, not this one, not this hook point, or rows of one
            class alone.
    """
    check_hook_point(cache, hook_point)
    names = cache.label_names
    if label not in names:
        known = ", ".join(names) if names else "none; build a cache from labelled data"
        raise ValueError(f"label must be one of those of {cache.path}, got {label!r} of {known}")
    number = names.index(label)
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for splits, n, what in (
        (("explain",), n_train, f"{label!r} in the split explain"),
        (("score", "hold"), n_test, f"{label!r} in the splits score and hold"),
    ):
        rows = cache.rows(splits)
        found = cache.token_labels(rows)
        check_two_classes((found[found >= 0] == number).numpy(), what)
        sides.append(_balanced(rows, found, number, n // 2, generator))
    (train, train_y), (test, test_y) = sides
    source = cache[hook_point]
    group = cache.refs(test).example.numpy()
    return Task(source[train], train_y, source[test], test_y, group)


def common_labels(cache: ActivationCache, least: int = LEAST) -> tuple[str, ...]:
    """Labels with at least `least` rows on both sides, the most frequent first.

    Raises:
        ValueError: If the cache has none.
    """
    n_labels = len(cache.label_names)
    counts = []
    for splits in (("explain",), ("score", "hold")):
        found = cache.token_labels(cache.rows(splits))
        counts.append(torch.bincount(found[found >= 0], minlength=n_labels))
    least_of = torch.minimum(*counts) if n_labels else torch.zeros(0, dtype=torch.int64)
    order = least_of.argsort(descending=True, stable=True).tolist()
    names = tuple(cache.label_names[i] for i in order if int(least_of[i]) >= least)
    if len(names) < 2:
        raise ValueError(
            f"{cache.path} must have two labels with {least} rows in explain and in score and hold,"
            f" got {len(names)}; build a cache from labelled data"
        )
    return names


def check_hook_point(cache: ActivationCache, hook_point: str) -> None:
    """Refuse a cache that was made at another place.

    Raises:
        ValueError: If it does not hold the hook point.
    """
    if hook_point not in cache.hook_points:
        raise ValueError(
            f"{cache.path} must hold the hook point {hook_point}, got "
            f"{', '.join(cache.hook_points)}; build that cache or pass its path"
        )


def _balanced(
    rows: Int[Tensor, " row"],
    found: Int[Tensor, " row"],
    number: int,
    n: int,
    generator: torch.Generator,
) -> tuple[Tensor, np.ndarray]:
    """At most n rows of the label and as many of others, in random order."""
    own, others = rows[found == number], rows[(found >= 0) & (found != number)]
    n = min(n, len(own), len(others))
    picked = [part[torch.randperm(len(part), generator=generator)[:n]] for part in (own, others)]
    order = torch.randperm(2 * n, generator=generator)
    return torch.cat(picked)[order], (order < n).numpy()
