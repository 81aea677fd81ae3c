"""Explain a dictionary of images: encode, label by classes or words, score on others, write."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from activations_cache.checks import MonosemaError, Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.baselines import baseline_dictionary
from sae.explain.config import ExplainConfig, ImageLabelConfig
from sae.explain.examples import Context
from sae.explain.image_firings import Captions, ImagePart, top_pictures
from sae.explain.image_labels import (
    ByClass,
    ByWords,
    Concepts,
    ImageWords,
    by_words,
    concepts_of,
)
from sae.explain.image_summary import ImageLabelScorer, ImageSummary, Scored
from sae.explain.scores import Mean
from sae.explain.tables import LatentRecord, write_tables
from sae.explain.text_at_rows import Cache
from sae.statistics import Interval

N_STEPS = 5
"""Equal steps of a latent's peak, from 0 to its largest, of the curve."""

SAMPLE = 16_384
"""Rows from which the thresholds of untrained latents are taken, at most."""

PRIOR_IMAGES = 1.0
"""Pseudo-images, firing at the latent's own rate, in p(fires | class)."""


@dataclass(frozen=True)
class Pictures:
    """A cache of images, and what explaining needs to know of the images themselves."""

    cache: Cache
    """Rows, classes and splits."""
    names: Sequence[str]
    """What the image of each example is called."""
    n_patches: int
    """Patches of an image; row by row they are the first token numbers."""
    words: ImageWords | Captions | None = None
    """Words and every image in one space, or a caption of each; needed where the config says so."""


class ExplainedImages(NamedTuple):
    """The labels of a dictionary in figures."""

    summary: ImageSummary
    """Of its own latents."""
    untrained: dict[str, ImageSummary]
    """Of random directions and raw neurons that are as dense as its latents."""
    words: Mapping[str, Any]
    """What is recorded of the towers or captions, where labels are words; else empty."""


def explain_images(
    dictionary: SparseAutoencoder,
    pictures: Pictures,
    hook_point: str,
    config: ExplainConfig,
    out_dir: Path | None,
    *,
    progress: Progress | None = None,
) -> ExplainedImages:
    """Label all latents on the explain split and score the labels on the score split.

    Labels are classes and groups of them, or with `images.words` and `images.captions` words.

    Needs 4 bytes for each image and latent beside the firings.

    Args:
        dictionary: What is explained.
        pictures: Of what the dictionary was trained on, split by image.
        hook_point: Which activations it reads.
        config: How; of it `images`, `n_baseline`, `seed`, `histogram_bins`, `words_per_label`.
        out_dir: Where latents.parquet, examples.parquet and summary.json go; None writes none.
        progress: Called with the units "rows encoded" and "latents' pictures".

    Raises:
        ValueError: If there are not two classes, or a split is empty.
    """
    report = progress or silent
    cache, images = pictures.cache, config.images
    if not images.by_words:
        concepts_of(cache.label_names, images.group_separator)  # refused before rows are encoded
    parts = [
        ImagePart(dictionary, cache, hook_point, s, report, any_class=images.by_words)
        for s in ("explain", "score")
    ]
    said, d_sae = _said(parts, pictures, config), parts[0].codes.d_sae
    result = ImageLabelScorer(parts[0].peaks, parts[1].peaks, said, images, config.seed).scored()
    arms = _untrained(parts, pictures.cache, hook_point, said, config, report)
    facts = {**pictures.words.facts, "n_concepts": len(said.names)} if pictures.words else {}
    explained = ExplainedImages(result.summary, arms, facts)
    if out_dir is None:
        return explained
    records = (_record(result, parts, said, config, latent) for latent in range(d_sae))
    examples = _examples(parts, pictures, config, report)
    n_rows = {f"n_rows_{part.split}": part.codes.n_rows for part in parts}
    summary = {
        **_flat(result.summary),
        **n_rows,
        "baselines": {name: _flat(arm) for name, arm in arms.items()},
        "config": dataclasses.asdict(config),
        **({"words": facts} if facts else {}),
    }
    n_examples = images.top_images + 5 * images.bucket_images
    write_tables(out_dir, records, examples, n_examples, summary)
    return explained


def _said(
    parts: Sequence[ImagePart], pictures: Pictures, config: ExplainConfig
) -> ByClass | ByWords:
    """What the labels may say, and which images of the two splits have it."""
    cache, images = pictures.cache, config.images
    if isinstance(pictures.words, Captions):
        return _by_captions(pictures.words, parts, images)
    if pictures.words is None:
        assert not images.by_words, "the caller reads what the config names"
        concepts = concepts_of(cache.label_names, images.group_separator)
        has = [concepts.has(part.classes) for part in parts]
        return ByClass(concepts, (has[0], has[1]), images)
    folders, numbers = (parts[1].classes, cache.label_names), [part.numbers for part in parts]
    where = (numbers[0], numbers[1])
    return by_words(pictures.words, where, folders, images, config.words_per_label)


class _Written(Concepts):
    """Words of captions."""

    def kind(self, concept: int) -> str:
        """What a label is."""
        return "image word" if concept >= 0 else ""


def _by_captions(
    captions: Captions, parts: Sequence[ImagePart], images: ImageLabelConfig
) -> ByClass:
    """Words that at least `min_images` and at most half of the images to label from have."""
    of_split = [
        [set(re.findall(r"\w+", captions.texts[int(n)].casefold())) for n in part.numbers.tolist()]
        for part in parts
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


def _untrained(
    parts: Sequence[ImagePart],
    cache: Cache,
    hook_point: str,
    said: ByClass | ByWords,
    config: ExplainConfig,
    report: Progress,
) -> dict[str, ImageSummary]:
    """Random directions and raw neurons, as dense as latents spread evenly over the live ones."""
    n_fired = np.sum([part.codes.n_fired for part in parts], axis=0)
    density = np.sort(n_fired[n_fired > 0] / sum(part.codes.n_rows for part in parts))
    n = config.n_baseline
    if not (n and len(density)):
        return {}
    places = np.linspace(0, len(density) - 1, n).round().astype(int)
    ids = cache.rows(("explain",))
    rows = cache[hook_point][ids[:: max(1, len(ids) // SAMPLE)]].cpu()
    wanted = np.clip(density[places], 1 / len(rows), 0.5).tolist()
    untrained = baseline_dictionary(rows, n, wanted, config.seed)
    any_class = config.images.by_words
    on = [
        ImagePart(untrained, cache, hook_point, part.split, report, any_class=any_class)
        for part in parts
    ]
    results = {}
    for first, name in ((0, "random directions"), (n, "raw neurons")):
        peaks = [part.peaks[:, first : first + n] for part in on]
        judge = ImageLabelScorer(peaks[0], peaks[1], said, config.images, config.seed)
        results[name] = judge.scored().summary
    return results


def _examples(
    parts: Sequence[ImagePart], pictures: Pictures, config: ExplainConfig, progress: Progress
) -> Iterator[Context]:
    d_sae = parts[0].codes.d_sae
    for latent in range(d_sae):
        yield from top_pictures(parts, latent, pictures.n_patches, pictures.names, config.images)
        if (latent + 1) % 256 == 0 or latent + 1 == d_sae:
            progress(latent + 1, d_sae, "latents' pictures")


def _record(
    result: Scored,
    parts: Sequence[ImagePart],
    said: ByClass | ByWords,
    config: ExplainConfig,
    latent: int,
) -> LatentRecord:
    labels, status = result.labels, result.status[latent]
    best = int(labels.concept[said.method][latent]) if status == "scored" else -1
    ranks = _listed(result, latent, best, config)
    listed = [int(labels.order[latent, rank]) for rank in ranks]
    n_images, n_fired = parts[0].n_images, int((parts[0].peaks[:, latent] > 0).sum())
    joint = [int(labels.joint[latent, rank]) for rank in ranks]
    n_has = [int(labels.n_has[i]) for i in listed]
    each = list(zip(joint, n_has, strict=True))
    known = [mutual_information(j, n_fired, n, n_images) for j, n in each]
    prior = PRIOR_IMAGES * n_fired / n_images
    weights = [(j + prior) / (n + PRIOR_IMAGES) for j, n in each]
    values = np.concatenate([part.codes.of(latent).values for part in parts])
    largest = float(values.max()) if len(values) else 0.0
    bins, _ = np.histogram(values, config.histogram_bins, (0.0, largest or 1.0))
    return LatentRecord(
        latent=latent,
        status=status,
        label=said.names[best] if best >= 0 else "",
        kind=said.kind(best) if best >= 0 else "",
        words=tuple(said.names[i] for i in listed),
        weights=tuple(weights),
        joint=tuple(joint),
        information=tuple(information for information, _ in known),
        npmi=tuple(npmi for _, npmi in known),
        gain=None,
        p_value=float(labels.p_value[latent, ranks[0]]) if ranks else None,
        auc=_known(float(result.scores.auc[latent])),
        low=_known(float(result.scores.low[latent])),
        high=_known(float(result.scores.high[latent])),
        control_auc=_known(float(result.control.auc[latent])),
        auc_wide=None,
        n_fired_explain=int(parts[0].codes.n_fired[latent]),
        n_fired_score=int(parts[1].codes.n_fired[latent]),
        density=len(values) / sum(part.codes.n_rows for part in parts),
        max_activation=largest,
        histogram=tuple(bins.tolist()) if len(values) else (),
        p_held_out=_known(float(result.scores.p_value[latent])),
        auc_strong=None,
        p_strong=None,
        **_curve(parts[1], said, best, latent),
    )


def _curve(part: ImagePart, said: ByClass | ByWords, best: int, latent: int) -> dict[str, Any]:
    """Share of the images with what the label says by steps of the latent's peak, unseen images."""
    if best < 0:
        return {"curve": (), "curve_n": (), "base": None}
    has, peaks = said.has[1][:, best], part.peaks[:, latent]
    step = np.ceil(peaks / max(float(peaks.max()), 1e-12) * N_STEPS).astype(int)
    inside = [has[step == i] for i in range(1, N_STEPS + 1)]
    shares = tuple(float(each.mean()) if len(each) else None for each in inside)
    return {
        "curve": shares,
        "curve_n": tuple(len(each) for each in inside),
        "base": float(has.mean()),
    }


def _listed(result: Scored, latent: int, best: int, config: ExplainConfig) -> list[int]:
    """The rank of the label's concept, then of others that may stand beside it."""
    if best < 0:
        return []
    order, listed = result.labels.order[latent], result.labels.listed[latent]
    first = int(np.flatnonzero(order == best)[0])
    others = [int(rank) for rank in np.flatnonzero(listed) if rank != first]
    return [first, *others][: config.words_per_label]


def mutual_information(joint: int, n_fired: int, n_has: int, n_images: int) -> tuple[float, float]:
    """Of firing and having, over images: in nats, and NPMI (-1: never together)."""
    table = np.array([
        [joint, n_fired - joint],
        [n_has - joint, n_images - n_fired - n_has + joint],
    ]) / n_images  # fmt: skip
    expected = np.outer(table.sum(axis=1), table.sum(axis=0))
    there = table > 0
    information = float((table[there] * np.log(table[there] / expected[there])).sum())
    share = float(table[0, 0])
    if share <= 0:
        return information, -1.0
    npmi = 1.0 if share == 1 else float(np.log(share / expected[0, 0]) / -np.log(share))
    return information, npmi


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _flat(summary: ImageSummary) -> dict[str, object]:
    """The summary as JSON takes it: named tuples as objects, nan as null."""
    return {f.name: _plain(getattr(summary, f.name)) for f in dataclasses.fields(summary)}


def _plain(value: object) -> object:
    match value:
        case Mean() | Interval():
            return _plain(value._asdict())
        case dict():
            return {str(key): _plain(entry) for key, entry in value.items()}
        case float():
            return _known(value)
        case _:
            return value
