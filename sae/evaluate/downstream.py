"""What a vision model's features are still good for with a dictionary spliced into its stream."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from activations_cache.hooks import edit
from activations_cache.progress import Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.replay import Replacement

IMAGES_AT_ONCE = 64


class Images(NamedTuple):
    """Pixels as the model reads them, and their classes: one part to fit on, one to score on."""

    train: Float[Tensor, "example 3 height width"]
    train_labels: Int[Tensor, " example"]
    test: Float[Tensor, "other 3 height width"]
    test_labels: Int[Tensor, " other"]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Of the pooled features with one stream."""

    knn: float
    """By the k nearest training images in cosine."""
    linear: float
    """By logistic regression."""


def downstream(
    dictionaries: Mapping[str, SparseAutoencoder],
    model: nn.Module,
    hook_point: str,
    images: Images,
    *,
    k: int = 5,
    progress: Progress | None = None,
) -> dict[str, Accuracy]:
    """Accuracy of the model as it is, with its stream ablated, and with each dictionary.

    Args:
        dictionaries: By name; "as it is", "zero" and "mean" are taken.
        model: A vision model in evaluation mode.
        hook_point: Where its stream is replaced, at all positions.
        images: What it reads.
        k: Neighbours.
        progress: Called with the unit "streams".

    Raises:
        ValueError: If images have one class, or a name is taken.
    """
    for labels, what in ((images.train_labels, "to fit on"), (images.test_labels, "to score on")):
        if len(labels.unique()) < 2:
            raise ValueError(f"images {what} must have two classes, got {len(labels.unique())}")
    mean = _mean_row(model, hook_point, images.train)
    streams: dict[str, Replacement] = {
        "as it is": lambda stream: stream,
        "zero": torch.zeros_like,
        "mean": lambda stream: mean.to(stream).expand_as(stream),
    }
    if taken := set(streams) & set(dictionaries):
        raise ValueError(f"dictionaries must not be named {min(taken)!r}; rename it")
    for name, of_one in dictionaries.items():
        streams[name] = _reconstructed(of_one)
    found = {}
    for done, (name, stream) in enumerate(streams.items(), start=1):
        sides = [features(model, hook_point, x, stream) for x in (images.train, images.test)]
        found[name] = _accuracy(sides[0], sides[1], images, k)
        (progress or silent)(done, len(streams), "streams")
    return found


@torch.no_grad()
def features(
    model: nn.Module,
    hook_point: str,
    pixels: Float[Tensor, "example 3 height width"],
    stream: Replacement,
) -> Float[Tensor, "example d_model"]:
    """Pooled features of images: what the model pools itself, else its first position."""
    with edit(model, {hook_point: lambda h, _: stream(h)}):
        return torch.cat([_pooled(model(part)) for part in pixels.split(IMAGES_AT_ONCE)]).float()


def _pooled(output: Any) -> Float[Tensor, "example d_model"]:
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled
    rows = output if isinstance(output, Tensor) else output.last_hidden_state
    return rows if rows.dim() == 2 else rows[:, 0]


@torch.no_grad()
def _mean_row(model: nn.Module, hook_point: str, pixels: Tensor) -> Float[Tensor, " d_model"]:
    seen: list[Tensor] = []

    def look(h: Tensor, _: Tensor) -> Tensor:
        seen.append(h.flatten(0, 1).double().mean(dim=0) * len(h))
        return h

    with edit(model, {hook_point: look}):
        for part in pixels.split(IMAGES_AT_ONCE):
            model(part)
    return torch.stack(seen).sum(dim=0) / len(pixels)


def _reconstructed(dictionary: SparseAutoencoder) -> Callable[[Tensor], Tensor]:
    return lambda h: dictionary(h.flatten(0, 1).float()).view(h.shape).to(h)


def _accuracy(
    train: Float[Tensor, "example d_model"],
    test: Float[Tensor, "other d_model"],
    images: Images,
    k: int,
) -> Accuracy:
    y, wanted = images.train_labels.numpy(), images.test_labels.numpy()
    unit = [torch.nn.functional.normalize(x, dim=1).numpy() for x in (train, test)]
    near = KNeighborsClassifier(min(k, len(y)), algorithm="brute").fit(unit[0], y)
    scale = train.std(dim=0).clamp_min(1e-6)
    mean = train.mean(dim=0)
    rows = [((x - mean) / scale).numpy() for x in (train, test)]
    linear = LogisticRegression(max_iter=1000).fit(rows[0], y)
    return Accuracy(
        knn=float((near.predict(unit[1]) == wanted).mean()),
        linear=float((linear.predict(rows[1]) == wanted).mean()),
    )
