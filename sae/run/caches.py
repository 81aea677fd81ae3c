"""Caches: build one, check one, look at one, import an array, list a model's hook points.

The images of a cache and words, embedded into one space.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

import activations_cache
from activations_cache import ActivationCache, io
from activations_cache.checks import CacheFormatError, MonosemaError, Progress, silent
from activations_cache.config import (
    SPLITS,
    TRAINING_SPLITS,
    CacheConfig,
    Dtype,
    ImagesConfig,
    ModelConfig,
    TextConfig,
    TextSource,
)
from activations_cache.documents import documents
from activations_cache.hooks import hook_points_of, noted_hook_points
from activations_cache.image_rows import CachedImages
from activations_cache.images import read_images
from activations_cache.importing import import_array
from activations_cache.manifest import MANIFEST
from activations_cache.models import LoadedModel
from activations_cache.probe import record_of
from activations_cache.recompute import recompute
from activations_cache.summary import HookSummary, summarise, within
from activations_cache.towers import load_towers, read_concepts
from activations_cache.vision import LoadedVisionModel, load_any_model
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.geometry import modality_gap
from sae.explain.config import ImageLabelConfig, WordsConfig
from sae.explain.image_labels import concepts_of, spoken
from sae.explain.image_run import Captions, ImageWords
from sae.run.context import (
    CacheOrPath,
    FactTable,
    Steps,
    holds_images,
    model_of,
    opened,
    steps_to,
    wrong_class,
)

BARS = " ▁▂▃▄▅▆▇█"


def cache(
    model: ModelConfig | str | Path,
    data: TextConfig | ImagesConfig | TextSource | str | Path,
    hook_points: str | Sequence[str],
    *,
    n_rows: int,
    out: str | Path,
    dtype: Dtype = "bfloat16",
    progress: Progress = silent,
) -> ActivationCache:
    """Run a model over texts or images and store its activations; or go on with such a cache.

    Args:
        model: A path or a hub id, or all about it.
        data: A text file or a data set of texts, or all about texts or images.
        hook_points: One or several, such as "model.layers.15:out".
        n_rows: How many positions are stored.
        out: The cache's directory.
        dtype: Number format of the rows.
        progress: Called while it is built.

    Raises:
        TypeError: If an argument is of another class.
        ValueError: If something fits nothing else.
    """
    text, images = _text(data), data if isinstance(data, ImagesConfig) else None
    config = CacheConfig(
        model=_model(model),
        text=text,
        images=images,
        hook_points=(hook_points,) if isinstance(hook_points, str) else tuple(hook_points),
        n_rows=n_rows,
        dtype=dtype,
    )
    return activations_cache.build(config, Path(out), progress=progress)


def _model(model: ModelConfig | str | Path) -> ModelConfig:
    if isinstance(model, ModelConfig):
        return model
    if isinstance(model, str | Path):
        return ModelConfig(path=str(model))
    raise wrong_class("model", "be a path, a hub id or a ModelConfig", model, "it is loaded here")


def _text(data: object) -> TextConfig | None:
    """All about texts; None for images."""
    if isinstance(data, str | Path):
        data = TextSource(path=str(data))
    if isinstance(data, TextSource):
        data = TextConfig(sources=(data,))
    if isinstance(data, TextConfig | ImagesConfig):
        return data if isinstance(data, TextConfig) else None
    rule = "be a path, a TextSource, a TextConfig or an ImagesConfig"
    raise wrong_class("data", rule, data, "see docs/cache.md")


def verify(
    cache: CacheOrPath,
    *,
    with_model: bool = False,
    moved: str | Path | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Check a cache's files by their checksums, and on request 64 rows by the model.

    Args:
        cache: The cache.
        with_model: Compute rows again.
        moved: Where the model is now, if it has moved.
        progress: Called in both steps.

    Returns:
        What is wrong, a line each; empty if nothing is.
    """
    return verify_cache(opened(cache), with_model=with_model, moved=moved, steps=steps_to(progress))


def verify_cache(
    cache: ActivationCache, *, with_model: bool, moved: str | Path | None, steps: Steps
) -> list[str]:
    """Check a cache's files, and on request its rows, in two steps."""
    with steps("verify") as progress:
        problems = [str(problem) for problem in cache.verify(progress=progress)]
    if with_model:
        with steps("recompute") as progress:
            problems += map(str, recompute(cache, model(cache, moved), progress=progress))
    return problems


def damage_of(path: str | Path, steps: Steps) -> list[str]:
    """Return what is wrong with a cache's files, a line each; its manifest may be damaged too."""
    if not (Path(path) / MANIFEST).is_file():
        return []
    try:
        cache = activations_cache.open(path)
    except CacheFormatError as error:
        return [str(error)]
    return verify_cache(cache, with_model=False, moved=None, steps=steps)


def reopen(path: str | Path) -> None:
    """Make a complete cache an unfinished one: building it again writes what is damaged anew."""
    io.unlink(Path(path) / MANIFEST)
    io.sync_directory(Path(path))


def look_at(cache: CacheOrPath, progress: Progress = silent) -> list[FactTable]:
    """Return what a cache was made from and what its rows look like."""
    cache = opened(cache)
    return cache_facts(cache, [summarise(cache, name, progress) for name in cache.hook_points])


def cache_facts(cache: ActivationCache, summaries: Sequence[HookSummary]) -> list[FactTable]:
    """What a cache is, and what the rows of each hook point look like."""
    plan, manifest = cache.manifest.plan, cache.manifest
    n_positions = plan.n_examples * plan.context
    left_out = n_positions - manifest.n_rows
    facts = [
        ("rows", f"{manifest.n_rows:,} in {plan.n_shards:,} shards"),
        ("size", f"{cache.n_bytes / 1e9:,.2f} GB, {plan.dtype}, compression {plan.compression}"),
        ("examples", f"{plan.n_examples:,} of {plan.context:,} positions"),
        ("left out", f"{left_out:,} of {n_positions:,} positions ({left_out / n_positions:.2%})"),
        ("not finite", f"{manifest.n_quarantined:,} of these"),
        ("fingerprint", cache.fingerprint),
    ]
    parts = [FactTable(str(cache.path), [*facts, *_made_from(cache)])]
    for summary in summaries:
        note = f"{summary.n_sampled:,} training rows, spread evenly"
        parts.append(FactTable(summary.hook_point, _summary_rows(cache, summary), note))
    return parts


def _made_from(cache: ActivationCache) -> list[tuple[str, str]]:
    request = cache.manifest.plan.request.get("config", {})
    model = request.get("model", {}).get("path")
    return [("model", f"{model} ({cache.identity['model']['dtype']})")] if model else []


def _summary_rows(cache: ActivationCache, summary: HookSummary) -> list[tuple[str, str]]:
    quantiles = cache[summary.hook_point].statistics.norm_quantiles
    low, high = summary.norm_edges[0], summary.norm_edges[-1]
    top = max(summary.norm_counts)
    bars = "".join(BARS[-(-8 * count // top)] for count in summary.norm_counts)
    massive = ", ".join(f"{m.dimension} ({m.ratio:.0f} x)" for m in summary.massive)
    return [
        ("width", f"{cache.d_model(summary.hook_point):,}"),
        ("norm", "  ".join(f"{name}: {value:.4g}" for name, value in quantiles.items())),
        ("norms, log scale", f"{low:.3g} {bars} {high:.3g}"),
        ("massive dimensions", massive or "none"),
        ("effective rank", f"{summary.effective_rank:.0f} (RankMe)"),
        ("share of the mean", f"{summary.mean_share:.1%} of the mean square norm"),
    ]


def model(cache: CacheOrPath, moved: str | Path | None = None) -> LoadedModel | LoadedVisionModel:
    """Load the model that made a cache.

    Args:
        cache: The cache.
        moved: Where the model is now, if it has moved.
    """
    return load_any_model(model_of(opened(cache), None if moved is None else str(moved)))


def hook_points(model: ModelConfig | str | Path, progress: Progress = silent) -> list[str]:
    """Return the hook points of a model."""
    return list(hook_points_of(load_any_model(_model(model), progress=progress).model))


class Listing(NamedTuple):
    """The hook points of a model, and what is true of it."""

    points: list[tuple[str, str]]
    """Each with what is to be said of it, such as that it is not what is added to the stream."""
    record: list[tuple[str, str]]
    """What was seen of a language model in a trial, by subject; empty for a vision tower."""


def list_hook_points(model: ModelConfig | str | Path, progress: Progress = silent) -> Listing:
    """Return every hook point of a model, with notes, and the record of the model."""
    loaded = load_any_model(_model(model), progress=progress)
    record = record_of(loaded.model).lines() if isinstance(loaded, LoadedModel) else []
    return Listing(noted_hook_points(loaded.model), record)


def import_rows(
    array: str | Path,
    out: str | Path,
    *,
    hook_point: str = "embedding:out",
    dtype: Dtype = "float32",
    progress: Progress = silent,
) -> ActivationCache:
    """Turn an array of rows (embeddings, say) into a cache.

    Args:
        array: .npy, .safetensors[::NAME], a Zarr array, or a directory of vLLM's hidden states.
        out: The cache's directory.
        hook_point: How the rows are called.
        dtype: Number format of the rows.
        progress: Called while rows are copied.
    """
    return import_array(str(array), str(out), hook_point=hook_point, dtype=dtype, progress=progress)


def as_trained(
    dictionaries: Mapping[str, SparseAutoencoder],
    cache: ActivationCache,
    hook_point: str,
    max_norm: float | None = None,
) -> ActivationCache:
    """Return a cache without the rows that are too large for the training of dictionaries.

    Without a limit it is the least of those that their provenance records.
    """
    recorded = (d.provenance.get("rows_left_out") or {} for d in dictionaries.values())
    known = [part["max_norm"] for part in recorded if part.get("max_norm")]
    sides = (d.config.hook_points_or(hook_point) for d in dictionaries.values())
    points = sorted({point for side in sides for part in side for point in part})
    return within(cache, points, max_norm or min(known, default=None))


def check_splits(
    cache: ActivationCache, splits: tuple[str, ...], *, by_words: bool = False
) -> None:
    """Refuse splits that nothing can be measured on, before anything slow begins.

    Args:
        cache: Of texts or images.
        splits: Which.
        by_words: Whether images get words for labels; then they need no classes.

    Raises:
        ValueError: If one is empty, or its images are of fewer than two classes.
    """
    kind = "images" if holds_images(cache) else "text"
    by_class = kind == "images" and not (by_words and len(classes_of(cache)) < 2)
    if by_class:
        concepts_of(classes_of(cache), None)
    for split in splits:
        advice = f"give it a larger share in cache.{kind}, or add {kind}"
        if not in_splits(cache, (split,)).any():
            raise MonosemaError(f"the split {split} must hold {kind}, got none; {advice}")
        present = classes_of(cache, (split,))
        if by_class and len(present) < 2:
            raise MonosemaError(
                f"images of the split {split} must be of two classes or more, got "
                f"{', '.join(present) or 'none'}; {advice}"
            )


def classes_of(cache: ActivationCache, splits: tuple[str, ...] = SPLITS) -> tuple[str, ...]:
    """Names of the classes that images of these splits have."""
    label = cache.examples.label
    if label is None:
        return ()
    numbers = label[in_splits(cache, splits), 0].unique().tolist()
    return tuple(cache.label_names[i] for i in numbers if i >= 0)


def in_splits(cache: ActivationCache, splits: tuple[str, ...]) -> Bool[Tensor, " example"]:
    """Which examples lie in these splits."""
    wanted = torch.tensor([SPLITS.index(name) for name in splits])
    return torch.isin(cache.examples.split, wanted)


def words_of(
    cache: ActivationCache, images: ImageLabelConfig, report: Progress
) -> ImageWords | Captions | None:
    """What labels of words are made of; None where the config wants classes.

    Raises:
        FileNotFoundError: If the towers, the concepts, captions or images are not there.
        ValueError: If the towers do not fit, there are fewer than two concepts, or an image has no
            caption.
    """
    if images.captions is not None:
        return captions_of(cache, images.captions)
    return None if images.words is None else _embedded(cache, images.words, report)


def captions_of(cache: ActivationCache, path: str) -> Captions:
    """What records with `image` and `text` say of the images of a cache, by their names.

    Raises:
        ValueError: If an image has no caption.
    """
    source = TextSource(path=path, field="text", label="image")
    known = {str(document.label): document.text for document in documents(source)}
    names = [record.name for record in read_images(cache)]
    if missing := [name for name in names if name not in known]:
        raise MonosemaError(
            f"{path} must have a record for each of {len(names)} images, got none for "
            f"{len(missing)}, the first of them {missing[0]}; its field `image` is the name that "
            "stands in images.jsonl of the cache"
        )
    return Captions([known[name] for name in names], {"captions": path})


def _embedded(cache: ActivationCache, config: WordsConfig, report: Progress) -> ImageWords:
    """Words and the images of a cache, through the towers.

    Images that nothing is labelled or scored on are left at zero.
    """
    folders = list(dict.fromkeys(map(spoken, cache.label_names)))
    names = read_concepts(config.concepts, config.field) if config.concepts else folders
    if len(names) < 2:
        raise MonosemaError(
            f"images.words.concepts must name a file where images lie in fewer than two folders, "
            f"got none and {len(names)} folders; name one with a word a line"
        )
    model = ModelConfig(path=config.tower, revision=config.revision, dtype="float32")
    towers = load_towers(model, progress=report)
    concepts = towers.concepts(names, config.templates, progress=report)
    images = CachedImages(cache)
    wanted = in_splits(cache, TRAINING_SPLITS).nonzero().flatten()
    digests = [images.records[example].sha256 for example in wanted.tolist()]
    seen = towers.images(images.image, wanted.tolist(), digests, progress=report)
    every = torch.zeros(len(images.records), towers.width)
    every[wanted] = seen
    facts = {
        "tower": towers.name,
        "fingerprint": towers.fingerprint,
        "method": config.method,
        "padding": towers.padding,
        "logit_scale": towers.scale,
        "modality_gap": modality_gap(concepts.embeddings, seen),
    }
    return ImageWords(concepts.names, concepts.embeddings, every, facts)
