"""A vision model and the images that it reads, as a source of rows.

Positions are those of the model's stream: class token and registers, if the model has them, then
the patches row by row. `rows/token` is the number of the patch in its image; what stands before the
patches has the numbers after those of the patches.

The images that a finished cache was made from, read again from where they lay.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import PIL
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from activations_cache.checks import CacheFormatError, MonosemaError, Progress
from activations_cache.config import SPLITS, CacheConfig, ImagesConfig, ImageSource
from activations_cache.hooks import capture
from activations_cache.image_sources import open_store
from activations_cache.images import (
    ImageRecord,
    PickedImages,
    pick,
    read_images,
    read_pixels,
    table_sha256,
    write_table,
)
from activations_cache.manifest import Plan
from activations_cache.preprocessing import Preprocessing, resolve
from activations_cache.reader import ActivationCache
from activations_cache.shard import Examples
from activations_cache.vision import ImageReading, LoadedVisionModel

_MAX_LABELS = 2**15


class ImageRows:
    """The vision model and the images of a configuration.

    Args:
        config: What to load; with images.
        loaded: Its model.
        request: What is recorded of the caller's wish.
        progress: Called while images are chosen.

    Raises:
        FileNotFoundError: If a source of images does not exist.
        ValueError: If images, sizes, hook points and the model do not fit together.
    """

    def __init__(
        self,
        config: CacheConfig,
        loaded: LoadedVisionModel,
        request: dict[str, Any],
        progress: Progress,
    ) -> None:
        images = _images(config)
        self._loaded, self._hook_points = loaded, config.hook_points
        self._preprocessing = preprocessing_of(config, loaded)
        self._context, skip = positions(images, loaded.reading, self._preprocessing.size)
        d_model = image_widths(config, loaded)
        self._picked = pick(
            images,
            n_rows=config.n_rows,
            rows_per_image=self._context - skip,
            progress=progress,
        )
        self.examples = _examples(self._picked, self._token_ids())
        self.plan = Plan(
            made_from={
                "model": loaded.identity,
                "images": self._identity(images),
                "contexts_per_forward": config.contexts_per_forward,
            },
            hook_points=d_model,
            dtype=config.dtype,
            compression=config.compression,
            context=self._context,
            skip_positions=skip,
            rows_per_shard=config.rows_per_shard,
            n_examples=len(self.examples),
            source_names=self._picked.source_names,
            label_names=self._picked.label_names,
            request=request,
        )

    @property
    def records(self) -> Sequence[ImageRecord]:
        """What is known of each image."""
        return self._picked.records

    def keep(self, numbers: Int[Tensor, " kept"], why: str) -> None:
        """Forget all images but these; `why` tells the rest from the whole."""
        self.examples, self.plan = self.examples.some(numbers), self.plan.only(len(numbers), why)
        kept = numbers.tolist()
        records, places = ([all_[n] for n in kept] for all_ in (self.records, self._picked.places))
        self._picked = replace(self._picked, records=records, places=places)

    def __call__(self, numbers: range) -> Mapping[str, Float[Tensor, "example pos _"]]:
        """Run the model on some images."""
        pixels = read_pixels(self._preprocessing, self._picked.image, numbers)
        streams = _run(self._loaded, self._hook_points, torch.from_numpy(pixels))
        return {name: stream[:, : self._context] for name, stream in streams.items()}

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the model came from, where it runs, what became of the images."""
        device = self._loaded.device
        return {
            "model": self._loaded.provenance,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "images": {
                "n_images": len(self._picked.records),
                "n_skipped": len(self._picked.skipped),
                "pillow": PIL.__version__,
            },
        }

    def write_table(self, path: Path) -> None:
        """Write what is known of each image, and which could not be read, into the cache."""
        write_table(path, self._picked.records, self._picked.skipped)

    def _token_ids(self) -> Int[Tensor, " pos"]:
        n_prefix = self._loaded.reading.n_prefix
        n_patches = (self._preprocessing.size // self._loaded.reading.patch) ** 2
        ids = torch.cat([torch.arange(n_patches, n_patches + n_prefix), torch.arange(n_patches)])
        return ids[: self._context]

    def _identity(self, images: ImagesConfig) -> dict[str, Any]:
        side = self._preprocessing.size // self._loaded.reading.patch
        preprocessing = asdict(self._preprocessing)
        return {
            "table_sha256": table_sha256(self._picked.records),
            "tokens": images.tokens,
            "grid": [side, side],
            "n_prefix": self._loaded.reading.n_prefix,
            "preprocessing": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in preprocessing.items()
            },
            **{name: getattr(images, name) for name in (*SPLITS, "seed")},
        }


def preprocessing_of(config: CacheConfig, loaded: LoadedVisionModel) -> Preprocessing:
    """Return what is done to each image, by the configuration and the model's own settings."""
    return resolve(_images(config).preprocessing, loaded.settings)


def positions(images: ImagesConfig, reading: ImageReading, size: int) -> tuple[int, int]:
    """Return how many positions of the stream a cache covers, and how many of them it skips.

    Raises:
        ValueError: If the model cannot read images of this size, or has no class token to keep.
    """
    n_positions = reading.n_positions(size)
    if images.tokens == "cls":
        if not reading.has_class_token:
            rule = "be patches or all for a model without a class token"
            raise MonosemaError(f"images.tokens must {rule}, got 'cls'")
        return 1, 0
    return n_positions, reading.n_prefix if images.tokens == "patches" else 0


def image_widths(config: CacheConfig, loaded: LoadedVisionModel) -> dict[str, int]:
    """Return the width of each hook point, by running the model on an empty image.

    Raises:
        ValueError: If a hook point does not carry the whole stream.
    """
    size = preprocessing_of(config, loaded).size
    n_positions = loaded.reading.n_positions(size)
    streams = _run(loaded, config.hook_points, torch.zeros(1, 3, size, size))
    for name, stream in streams.items():
        if stream.shape[1] != n_positions:
            rule = f"carry the {n_positions} positions of the stream"
            raise MonosemaError(f"hook_points must {rule}, got {stream.shape[1]} at {name}")
    return {name: stream.shape[-1] for name, stream in streams.items()}


def _run(
    loaded: LoadedVisionModel,
    hook_points: tuple[str, ...],
    pixels: Float[Tensor, "example 3 size size"],
) -> dict[str, Float[Tensor, "example pos _"]]:
    with capture(loaded.model, hook_points) as run:
        given = pixels.to(loaded.device, loaded.dtype)
        return run(given, **loaded.reading.options(pixels.shape[-1]))


def _images(config: CacheConfig) -> ImagesConfig:
    assert config.images is not None, "only called where there are images"
    return config.images


def _examples(picked: PickedImages, token_ids: Int[Tensor, " pos"]) -> Examples:
    n_labels = len(picked.label_names)
    if n_labels > _MAX_LABELS:
        raise MonosemaError(f"classes must be at most {_MAX_LABELS:,}, got {n_labels:,}")
    of_name = {name: i for i, name in enumerate(picked.label_names)} | {None: -1}
    label = torch.tensor([of_name[record.label] for record in picked.records])
    sources = [picked.source_names.index(record.source) for record in picked.records]
    shape = (len(picked.records), len(token_ids))
    return Examples(
        tokens=token_ids.expand(shape),
        split=torch.tensor([SPLITS.index(record.split) for record in picked.records]),
        source=torch.tensor(sources),
        source_names=picked.source_names,
        label=label[:, None].expand(shape) if n_labels else None,
        label_names=picked.label_names,
    )


class CachedImages:
    """Images and pixels by the number of their example; each is checked against its hash.

    Args:
        cache: A cache of images.
        sources: Where they are now, in the order of the cache's sources, if they have moved.

    Raises:
        CacheFormatError: If the cache is of text, or its table is damaged.
        FileNotFoundError: If a source is not there any more.
    """

    def __init__(
        self, cache: ActivationCache, sources: Sequence[ImageSource] | None = None
    ) -> None:
        self.records = read_images(cache)
        made = cache.identity["images"]
        self.preprocessing = _preprocessing(made["preprocessing"])
        self.n_prefix: int = made["n_prefix"]
        """Positions of the stream before the first patch."""
        self.grid: tuple[int, int] = (made["grid"][0], made["grid"][1])
        """Rows and columns of patches."""
        names = cache.manifest.plan.source_names
        self._stores = dict(zip(names, map(open_store, sources or _sources(cache)), strict=True))
        # An archive may hold several files of one name; their bytes tell which one is meant.
        self._numbers: dict[tuple[str, str], list[int]] = defaultdict(list)
        for source, store in self._stores.items():
            for number, name in enumerate(store.names):
                self._numbers[source, name].append(number)

    def image(self, example: int) -> Image.Image:
        """Return the image of an example, decoded.

        Raises:
            CacheFormatError: If it is gone or has other bytes now.
        """
        record = self.records[example]
        store, found = self._stores[record.source], "no such image"
        for number in self._numbers.get((record.source, record.name), ()):
            found = hashlib.sha256(store.data(number)).hexdigest()
            if found == record.sha256:
                return store.image(number)
        raise CacheFormatError(
            f"image {record.name} of {record.source} must have sha256 {record.sha256}, got "
            f"{found}; the source has changed since the cache was built"
        )

    def pixels(self, examples: Int[Tensor, " example"]) -> Float[Tensor, "example 3 size size"]:
        """Return what the model read for some examples."""
        return torch.from_numpy(read_pixels(self.preprocessing, self.image, examples.tolist()))


def _sources(cache: ActivationCache) -> list[ImageSource]:
    recorded = cache.manifest.plan.request["config"]["images"]["sources"]
    return [ImageSource(**source) for source in recorded]


def _preprocessing(entries: Mapping[str, Any]) -> Preprocessing:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()
    }
    return Preprocessing(**values)
