"""Images as what labels speak of: by classes, groups of classes, or words."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from monosema.checks import MonosemaError, Progress
from sae.explain.config import ImageLabelConfig
from sae.explain.examples import (
    N_FIFTHS,
    Activity,
    Context,
    ImagePart,
    SplitImages,
    activity,
    image_rows,
    top_pictures,
)
from sae.explain.firings import Codes
from sae.explain.image_labels import (
    ByClass,
    ByWords,
    Concepts,
    ImageLabels,
    concepts_of,
    spoken,
)
from sae.explain.image_summary import ExplainedImages, ImageLabelScorer
from sae.explain.run import SPLITS, Units
from sae.explain.scores import known_or_none
from sae.explain.statistics import mutual_information, normalised_pmi

PRIOR_IMAGES = 1.0
"""Pseudo-images, firing at the latent's own rate, in p(fires | class)."""


class ImageWords(NamedTuple):
    """Words and images in one space."""

    names: tuple[str, ...]
    """Words, or captions."""
    texts: Float32[Tensor, "word d_model"]
    """Their embeddings, of norm 1."""
    images: Float32[Tensor, "example d_model"]
    """Of every image of the cache, of norm 1."""
    facts: Mapping[str, Any]
    """What is recorded of the towers."""


class Captions(NamedTuple):
    """What was written about the images of a cache."""

    texts: Sequence[str]
    """One for each example of the cache."""
    facts: Mapping[str, Any]
    """What is recorded of them."""


@dataclass(frozen=True, eq=False)
class ImageUnits(Units[ImagePart, ExplainedImages]):
    """The images of a cache; of the config `images` and what is not of text is read.

    Needs 4 bytes for each image and latent beside the firings.
    """

    names: Sequence[str]
    """What the image of each example is called."""
    n_patches: int
    """Patches of an image; row by row they are the first token numbers."""
    words: ImageWords | Captions | None = None
    """Words and every image in one space, or a caption of each; needed where the config says so."""
    name = "pictures"
    n_sampled = 16_384

    @cached_property
    def splits(self) -> Mapping[str, SplitImages]:
        """The rows of the images of each split."""
        images = self.config.images
        if not images.by_words:
            concepts_of(self.cache.label_names, images.group_separator)  # refused before all else
        return {split: image_rows(self.cache, split, any_class=images.by_words) for split in SPLITS}

    @property
    def n_shown(self) -> int:
        """Pictures with the largest peaks, and those of each fifth."""
        return self.config.images.top_images + N_FIFTHS * self.config.images.images_per_fifth

    def firings(self, split: str, codes: Codes) -> ImagePart:
        """The codes with the images."""
        return ImagePart(split, codes, self.splits[split])

    def shown(self, parts: Sequence[ImagePart]) -> Callable[[int], Iterator[Context]]:
        """Pictures of both splits."""
        return partial(top_pictures, parts, self.n_patches, self.names, self.config.images)

    @cached_property
    def concepts(self) -> ByClass | ByWords:
        """What the labels may say, and which images of the two splits have it."""
        cache, images, splits = self.cache, self.config.images, tuple(self.splits.values())
        if isinstance(self.words, Captions):
            return _by_captions(self.words, splits, images)
        if self.words is None:
            assert not images.by_words, "the caller reads what the config names"
            concepts = concepts_of(cache.label_names, images.group_separator)
            has = [concepts.has(rows.classes) for rows in splits]
            return ByClass(concepts, (has[0], has[1]), images)
        folders = (splits[1].classes, cache.label_names)
        numbers = (splits[0].numbers, splits[1].numbers)
        return by_words(self.words, numbers, folders, images, self.config.words_per_label)

    def labelled(self, parts: Sequence[ImagePart], progress: Progress) -> ExplainedImages:
        """Labels of the first part's images, scored on the second's."""
        del progress  # it is quick
        concepts, words = self.concepts, self.words
        more = {"words": {**words.facts, "n_concepts": len(concepts.names)}} if words else {}
        active = _activity(parts, self.config.histogram_bins)
        return ImageLabelScorer(parts, concepts, self.config).explained(active, more)

    def said(
        self, explained: ExplainedImages, parts: Sequence[ImagePart], latent: int
    ) -> dict[str, Any]:
        """The label and what else may stand beside it, and what they are worth on other images."""
        concepts, labels = self.concepts, explained.labels
        is_scored = explained.status[latent] == "scored"
        best = int(labels.concept[concepts.method][latent]) if is_scored else -1
        ranks = _listed(labels, latent, best)[: self.config.words_per_label]
        listed = labels.order[latent, ranks]
        joint, has = labels.joint[latent, ranks], labels.n_has[listed]
        n_images, n_fired = parts[0].n_images, (parts[0].peaks[:, [latent]] > 0).sum(axis=0)
        prior = PRIOR_IMAGES * n_fired / n_images
        counts = (joint, n_fired, has, n_images)
        return {
            "label": concepts.names[best] if best >= 0 else "",
            "kind": concepts.kind(best) if best >= 0 else "",
            "words": tuple(concepts.names[i] for i in listed),
            "weights": tuple(((joint + prior) / (has + PRIOR_IMAGES)).tolist()),
            "joint": tuple(joint.tolist()),
            "information": tuple(np.abs(mutual_information(*counts)).tolist()),
            "npmi": tuple(normalised_pmi(*counts).tolist()),
            "p_value": float(labels.p_value[latent, ranks[0]]) if ranks else None,
            "p_held_out": known_or_none(explained.scores.p_value[latent]),
            **_curve(parts[1], concepts, best, latent),
        }


def _activity(parts: Sequence[ImagePart], n_bins: int) -> Activity:
    """How often and how strongly latents fire, counted in double precision."""
    active, n_rows = activity(parts, n_bins), sum(part.codes.n_rows for part in parts)
    for latent in np.flatnonzero(active.n_fired):
        values = np.concatenate([part.codes.of(int(latent)).values for part in parts])
        span = (0.0, float(active.max_activation[latent]) or 1.0)
        active.histogram[latent], _ = np.histogram(values, n_bins, span)
    return active._replace(density=active.n_fired / n_rows)


def _listed(labels: ImageLabels, latent: int, best: int) -> list[int]:
    """The rank of the label's concept, then of others that may stand beside it."""
    if best < 0:
        return []
    first = int(np.flatnonzero(labels.order[latent] == best)[0])
    others = np.flatnonzero(labels.listed[latent]).tolist()
    return [first, *(rank for rank in others if rank != first)]


def _curve(part: ImagePart, concepts: ByClass | ByWords, best: int, latent: int) -> dict[str, Any]:
    """Share of the images with what the label says by fifths of the peak, on unseen images."""
    if best < 0:
        return {"curve": (), "curve_n": (), "base": None}
    has, peaks = concepts.has[1][:, best], part.peaks[:, latent]
    step = np.ceil(peaks / max(float(peaks.max()), 1e-12) * N_FIFTHS).astype(int)
    inside = [has[step == i] for i in range(1, N_FIFTHS + 1)]
    return {
        "curve": tuple(float(each.mean()) if len(each) else None for each in inside),
        "curve_n": tuple(len(each) for each in inside),
        "base": float(has.mean()),
    }


def by_words(
    words: ImageWords,
    examples: tuple[Int64[np.ndarray, " example"], Int64[np.ndarray, " other"]],
    folders: tuple[Int64[np.ndarray, " other"], tuple[str, ...]],
    config: ImageLabelConfig,
    n_listed: int,
) -> ByWords:
    """What labels of words are made of and scored on.

    An image counts as having a word if it is in the `share` of its split's images with the largest
    probability of the word, by softmax over all words of 10 x cosine as CLIP-Dissect takes it.

    Args:
        words: Of the towers, for every image of a cache.
        examples: Numbers of the images of the explain and of the score split.
        folders: Class of each image of the score split, and the names of the classes.
        config: With `words`.
        n_listed: Words that are kept of each latent.
    """
    assert config.words is not None, "only called where there are words"
    has = tuple(_likeliest(words, numbers, config.words.share) for numbers in examples)
    classes, names = folders
    number = {spoken(name).casefold(): i for i, name in enumerate(names)}
    of_word = np.array([number.get(spoken(name).casefold(), -2) for name in words.names])
    in_folder = classes[:, None] == of_word if (of_word >= 0).sum() > 1 else None
    seen = words.images[torch.from_numpy(examples[0])]
    return ByWords(
        words.names, words.texts, seen, (has[0], has[1]), in_folder, config.words,
        config.min_images, n_listed,
    )  # fmt: skip


def _likeliest(
    words: ImageWords, numbers: Int64[np.ndarray, " example"], share: float
) -> Bool[np.ndarray, "example word"]:
    p = (10.0 * words.images[torch.from_numpy(numbers)] @ words.texts.T).softmax(dim=1)
    has = torch.zeros(p.shape, dtype=torch.bool)
    return has.scatter_(0, p.topk(max(1, round(share * len(p))), dim=0).indices, True).numpy()


class _Written(Concepts):
    """Words of captions."""

    def kind(self, concept: int) -> str:
        """What a label is."""
        return "image word" if concept >= 0 else ""


def _by_captions(
    captions: Captions, splits: Sequence[SplitImages], images: ImageLabelConfig
) -> ByClass:
    """Words that at least `min_images` and at most half of the images to label from have."""
    of_split = [
        [set(re.findall(r"\w+", captions.texts[int(n)].casefold())) for n in rows.numbers.tolist()]
        for rows in splits
    ]
    counts, most = Counter(word for words in of_split[0] for word in words), len(of_split[0]) / 2
    names = tuple(sorted(w for w, n in counts.items() if images.min_images <= n <= most))
    if len(names) < 2:
        raise MonosemaError(
            f"captions must have at least two words that {images.min_images} to {most:.0f} of the "
            f"images to label from have, got {len(names)}; write more, or lower images.min_images"
        )
    has = [np.array([[name in words for name in names] for words in part]) for part in of_split]
    return ByClass(_Written(names, len(names), has[0]), (has[0], has[1]), images)
