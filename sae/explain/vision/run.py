"""Explain a dictionary of images: encode, label by classes, score on other images, write."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from activations_cache.progress import Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.explain.config import ExplainConfig
from sae.explain.examples import Context
from sae.explain.intervals import Interval
from sae.explain.scores import Mean
from sae.explain.tables import LatentRecord, write_tables
from sae.explain.vision.concepts import Concepts, concepts_of
from sae.explain.vision.firing import ImagePart
from sae.explain.vision.labelling import mutual_information
from sae.explain.vision.pictures import top_pictures
from sae.explain.vision.summary import ImageSummary, Judge, Scored
from sae.explain.words import Cache

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


def explain_images(
    dictionary: SparseAutoencoder,
    pictures: Pictures,
    hook_point: str,
    config: ExplainConfig,
    out_dir: Path | None,
    *,
    progress: Progress | None = None,
) -> ImageSummary:
    """Label all latents by classes on the explain split and score the labels on the score split.

    Needs 4 bytes for each image and latent beside the firings.

    Args:
        dictionary: What is explained.
        pictures: Of what the dictionary was trained on, split by image.
        hook_point: Which activations it reads.
        config: How; of it `images`, `seed`, `histogram_bins` and `words_per_label`.
        out_dir: Where latents.parquet, examples.parquet and summary.json go; None writes none.
        progress: Called with the units "rows encoded" and "latents' pictures".

    Raises:
        ValueError: If there are not two classes, or a split is empty.
    """
    report = progress or silent
    cache, own = pictures.cache, config.images
    concepts = concepts_of(cache.label_names, own.group_separator)
    parts = [ImagePart(dictionary, cache, hook_point, s, report) for s in ("explain", "score")]
    found = Judge(parts[0], parts[1], concepts, own, config.seed).scored()
    if out_dir is None:
        return found.summary
    d_sae = parts[0].codes.d_sae
    records = (_record(found, parts, concepts, config, latent) for latent in range(d_sae))
    examples = _examples(parts, pictures, config, report)
    summary = {"config": dataclasses.asdict(config), **_flat(found.summary)}
    n_examples = own.top_images + 5 * own.bucket_images
    write_tables(out_dir, records, examples, n_examples, summary)
    return found.summary


def _examples(
    parts: Sequence[ImagePart], pictures: Pictures, config: ExplainConfig, progress: Progress
) -> Iterator[Context]:
    d_sae = parts[0].codes.d_sae
    for latent in range(d_sae):
        yield from top_pictures(parts, latent, pictures.n_patches, pictures.names, config.images)
        if (latent + 1) % 256 == 0 or latent + 1 == d_sae:
            progress(latent + 1, d_sae, "latents' pictures")


def _record(
    found: Scored,
    parts: Sequence[ImagePart],
    concepts: Concepts,
    config: ExplainConfig,
    latent: int,
) -> LatentRecord:
    labels, status = found.labels, found.status[latent]
    best = int(labels.concept[config.images.method][latent]) if status == "scored" else -1
    listed = _listed(found, latent, best, config)
    n_images, n_fired = parts[0].n_images, int((parts[0].peaks[:, latent] > 0).sum())
    joint = [int(labels.joint[latent, i]) for i in listed]
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
        label=concepts.names[best] if best >= 0 else "",
        kind=concepts.kind(best) if best >= 0 else "",
        words=tuple(concepts.names[i] for i in listed),
        weights=tuple(weights),
        joint=tuple(joint),
        information=tuple(information for information, _ in known),
        npmi=tuple(npmi for _, npmi in known),
        gain=None,
        p_value=_known(float(found.scores.p_value[latent])),
        auc=_known(float(found.scores.auc[latent])),
        low=_known(float(found.scores.low[latent])),
        high=_known(float(found.scores.high[latent])),
        control_auc=_known(float(found.control.auc[latent])),
        auc_wide=None,
        n_fired_explain=int(parts[0].codes.n_fired[latent]),
        n_fired_score=int(parts[1].codes.n_fired[latent]),
        density=len(values) / sum(part.codes.n_rows for part in parts),
        max_activation=largest,
        histogram=tuple(bins.tolist()) if len(values) else (),
    )


def _listed(found: Scored, latent: int, best: int, config: ExplainConfig) -> list[int]:
    """The label's concept, then others that are certain too."""
    if best < 0:
        return []
    labels = found.labels
    certain = [
        int(i) for i in labels.order[latent] if labels.p_value[latent, i] <= config.images.max_p
    ]
    return [best, *(i for i in certain if i != best)][: config.words_per_label]


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
