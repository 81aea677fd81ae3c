"""What a vision model's features are still good for with a dictionary spliced into its stream.

Classes are told from the pooled output by the nearest training images and by logistic regression,
fitted anew on the features of each stream. Intervals are bootstraps over the test images.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from activations_cache.checks import MonosemaError, Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.config import EvaluateConfig
from sae.evaluate.resume_forward import Replacement, Replay
from sae.statistics import Interval, Resamples, interval

IMAGES_AT_ONCE = 32
AS_IT_IS = "as it is"
ABLATIONS = (AS_IT_IS, "zero", "mean")


class Images(NamedTuple):
    """Images by number, and their classes: one part to fit on, one to score on."""

    pixels: Callable[[Int[Tensor, " example"]], Float[Tensor, "example 3 height width"]]
    """What the model reads of some of them."""
    train: Int[Tensor, " example"]
    train_labels: Int[Tensor, " example"]
    test: Int[Tensor, " other"]
    test_labels: Int[Tensor, " other"]


class ReplacedStream(NamedTuple):
    """Where a vision model's stream is replaced."""

    model: nn.Module
    """In evaluation mode."""
    hook_point: str
    """Which stream."""
    mean: Float[Tensor, " d_model"]
    """Its mean row, for an ablation."""
    n_intact: int = 0
    """Positions before the rows that dictionaries were trained on: class token and registers."""
    options: Mapping[str, Any] = {}
    """Further arguments of a forward."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Of the pooled features with one stream."""

    knn: Interval
    """By the k nearest training images in cosine."""
    linear: Interval
    """By logistic regression."""
    knn_change: Interval
    """Above that of the model as it is; paired, so its interval is narrower."""
    linear_change: Interval
    """The same by logistic regression."""


@dataclass(frozen=True, kw_only=True)
class Downstream:
    """Accuracy of the model as it is ("as it is"), ablated ("zero", "mean"), and by dictionary."""

    n_train: int
    """Images to fit on."""
    n_test: int
    """Images to score on."""
    n_classes: int
    """Classes."""
    spliced: dict[str, Accuracy]
    """The stream replaced at all positions."""
    intact: dict[str, Accuracy]
    """The ablations with class token and registers left as they are; empty where there are none.
    What they carry at the hook point may be all that the classes need: where ablation costs nothing
    so, no dictionary can be told from another, and none is tried."""


def downstream(
    dictionaries: Mapping[str, SparseAutoencoder],
    place: ReplacedStream,
    images: Images,
    config: EvaluateConfig,
    *,
    progress: Progress | None = None,
) -> Downstream:
    """Accuracy of the model as it is, with its stream ablated, and with each dictionary.

    Args:
        dictionaries: By name; "as it is", "zero" and "mean" are taken.
        place: The model and where its stream is replaced.
        images: What it reads.
        config: Of it `n_neighbours`, `n_resamples` and `seed`.
        progress: Called with the unit "spliced images", then "features fitted".

    Raises:
        ValueError: If images have one class, or a name is taken.
    """
    for labels, what in ((images.train_labels, "to fit on"), (images.test_labels, "to score on")):
        if len(labels.unique()) < 2:
            raise MonosemaError(f"images {what} must have two classes, got {len(labels.unique())}")
    streams: dict[str, Replacement] = {
        AS_IT_IS: lambda stream: stream,
        "zero": torch.zeros_like,
        "mean": lambda stream: place.mean.to(stream).expand_as(stream),
    }
    if taken := set(streams) & set(dictionaries):
        raise MonosemaError(f"dictionaries must not be named {min(taken)!r}; rename it")
    for name, of_one in dictionaries.items():
        streams[name] = _reconstructed(of_one)
    n_intact = sorted({0, place.n_intact})
    result = features(
        place, images.pixels, torch.cat([images.train, images.test]), streams, progress
    )
    right: dict[tuple[int, str], _Right] = {}
    for done, (key, rows) in enumerate(result.items(), start=1):
        n_train = len(images.train)
        right[key] = _accuracies(rows[:n_train], rows[n_train:], images, config)
        (progress or silent)(done, len(result), "features fitted")
    resamples = Resamples(len(images.test), config.n_resamples, config.seed)
    sides = [
        {
            name: _accuracy(of_one, right[n, AS_IT_IS], resamples)
            for (at, name), of_one in right.items()
            if at == n
        }
        for n in n_intact
    ]
    return Downstream(
        n_train=len(images.train),
        n_test=len(images.test),
        n_classes=len(images.train_labels.unique()),
        spliced=sides[0],
        intact=sides[1] if len(sides) > 1 else {},
    )


@torch.no_grad()
def features(
    place: ReplacedStream,
    pixels: Callable[[Int[Tensor, " example"]], Float[Tensor, "example 3 height width"]],
    numbers: Int[Tensor, " example"],
    streams: Mapping[str, Replacement],
    progress: Progress | None = None,
) -> dict[tuple[int, str], Float[Tensor, "example d_model"]]:
    """Pooled features of images: what the model pools itself, else its first position.

    Args:
        place: Where the stream is replaced.
        pixels: What the model reads of some images.
        numbers: The images.
        streams: What flows on, by name.
        progress: Called with the unit "spliced images".

    Returns:
        By the number of positions that were left intact, and the name: 0, and for the streams that
        are ablations `place.n_intact` too.
    """
    parameter = next(place.model.parameters())
    read = partial(_pooled, options=dict(place.options))
    replay = Replay(place.model, place.hook_point, read=read)
    parts: dict[tuple[int, str], list[Tensor]] = {}
    for start in range(0, len(numbers), IMAGES_AT_ONCE):
        x = pixels(numbers[start : start + IMAGES_AT_ONCE]).to(parameter.device, parameter.dtype)
        stream = replay.base(x).stream
        for name, replacement in streams.items():
            new = replacement(stream)
            for n in {0, place.n_intact if name in ABLATIONS else 0}:
                spliced = torch.cat([stream[:, :n], new[:, n:]], dim=1)
                pooled = replay.spliced(x, lambda _, spliced=spliced: spliced)
                parts.setdefault((n, name), []).append(pooled.float().cpu())
        done = min(start + IMAGES_AT_ONCE, len(numbers))
        (progress or silent)(done, len(numbers), "spliced images")
    return {key: torch.cat(result) for key, result in parts.items()}


def _pooled(
    model: nn.Module, pixels: Tensor, options: dict[str, Any]
) -> Float[Tensor, "example d_model"]:
    output = model(pixels, **options)
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled
    rows = output if isinstance(output, Tensor) else output.last_hidden_state
    return rows if rows.dim() == 2 else rows[:, 0]


def _reconstructed(dictionary: SparseAutoencoder) -> Callable[[Tensor], Tensor]:
    return lambda h: dictionary(h.flatten(0, 1).float()).view(h.shape).to(h)


class _Right(NamedTuple):
    """Whether each test image was told right."""

    knn: Bool[np.ndarray, " other"]
    linear: Bool[np.ndarray, " other"]


def _accuracies(
    train: Float[Tensor, "example d_model"],
    test: Float[Tensor, "other d_model"],
    images: Images,
    config: EvaluateConfig,
) -> _Right:
    y, wanted = images.train_labels.numpy(), images.test_labels.numpy()
    unit = [torch.nn.functional.normalize(x, dim=1).numpy() for x in (train, test)]
    k = min(config.n_neighbours, len(y))
    near = KNeighborsClassifier(k, algorithm="brute").fit(unit[0], y)
    scale = train.std(dim=0).clamp_min(1e-6)
    mean = train.mean(dim=0)
    rows = [((x - mean) / scale).numpy() for x in (train, test)]
    linear = LogisticRegression(max_iter=1000).fit(rows[0], y)
    return _Right(near.predict(unit[1]) == wanted, linear.predict(rows[1]) == wanted)


def _accuracy(right: _Right, as_it_is: _Right, resamples: Resamples) -> Accuracy:
    ones = torch.ones(len(right.knn), dtype=torch.float64)

    def mean(values: np.ndarray) -> Interval:
        return interval(resamples.mean(torch.from_numpy(values.astype(np.float64)), ones))

    def change(values: np.ndarray, base: np.ndarray) -> Interval:
        return mean(values.astype(np.float64) - base)

    return Accuracy(
        knn=mean(right.knn),
        linear=mean(right.linear),
        knn_change=change(right.knn, as_it_is.knn),
        linear_change=change(right.linear, as_it_is.linear),
    )
