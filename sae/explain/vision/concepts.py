"""What a label of an image latent may say: a class, or a group of classes.

Windows of paired texts: an image latent is explained by the captions of its images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from monosema.checks import MonosemaError
from sae.explain.windows import LatentWindows, Window


class Concepts(NamedTuple):
    """Classes, then groups of classes."""

    names: tuple[str, ...]
    """What they are called."""
    n_classes: int
    """The first so many are classes, the others groups."""
    of_class: Bool[np.ndarray, "row word"]
    """Which concepts an image of each class has."""

    def kind(self, concept: int) -> str:
        """`class` or `group`."""
        return "class" if concept < self.n_classes else "group"

    def has(self, classes: Int[np.ndarray, " example"]) -> Bool[np.ndarray, "example word"]:
        """Which concepts images have, by the numbers of their classes."""
        return self.of_class[classes]


def concepts_of(classes: tuple[str, ...], separator: str | None) -> Concepts:
    """The classes, and the groups that at least two but not all of them belong to.

    Args:
        classes: Names of the classes.
        separator: What ends the name of the group in the name of a class; None for no groups.

    Raises:
        ValueError: If there are not two classes.
    """
    if len(classes) < 2:
        found = f"1 ({classes[0]})" if classes else "none"
        raise MonosemaError(
            f"images must be of two classes or more to be labelled, got {found}; put the images of "
            "each class into a folder of its own"
        )
    groups = [name.partition(separator)[0] if separator else "" for name in classes]
    shared = sorted({g for g in groups if g and 2 <= groups.count(g) < len(classes)} - set(classes))
    own = np.eye(len(classes), dtype=bool)
    of_group = np.array([[group == name for name in shared] for group in groups], bool)
    of_class = np.concatenate([own, of_group.reshape(len(classes), len(shared))], axis=1)
    return Concepts((*classes, *shared), len(classes), of_class)


def caption_windows(latent: LatentWindows, captions: Sequence[str]) -> LatentWindows:
    """The latent with each image replaced by its caption or report, and all of it marked.

    This is the idea of SAE-Rad (Abdulaal et al. 2024, arXiv 2410.03334): explainers and the
    detection scorer then work on images as they do on text. The activation of a caption is the
    image's peak.

    Args:
        latent: Windows that are whole images.
        captions: One text per example of the cache.
    """

    def captioned(window: Window) -> Window:
        return Window(
            window.example, 0, (captions[window.example],), (window.peak,), window.source,
            window.bucket, window.inclusion,
        )  # fmt: skip

    explain, score = (tuple(map(captioned, part)) for part in (latent.explain, latent.score))
    return LatentWindows(latent.latent, latent.max_activation, latent.density, explain, score)
