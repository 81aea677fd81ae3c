"""Which images a model reads, in which order, and in which split each of them lies.

An image goes to a split by a hash of its bytes, so copies of an image never meet across splits,
whatever they are called and wherever they lie. Another hash of the bytes gives the order, and as
many are taken from its beginning as needed. Images that cannot be read are left out and listed.

What a cache remembers of its images: `images.jsonl`, one line for each example, in order.

The hash of this file is part of the cache's identity, so the images cannot be mixed up. Images that
could not be read are in `skipped_images.jsonl`, which is only for information.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32
from PIL import Image

from activations_cache import io
from activations_cache.checks import CacheFormatError, MonosemaError, Progress, silent
from activations_cache.config import TRAINING_SPLITS, ImagesConfig
from activations_cache.image_sources import UNREADABLE, ImageStore, careful_pillow, open_store
from activations_cache.layout import IMAGE_TABLE
from activations_cache.loading import one_line
from activations_cache.preprocessing import Preprocessing, as_rgb
from activations_cache.reader import ActivationCache
from activations_cache.writer import LOCKS

SKIPPED = "skipped_images.jsonl"


class ImageRecord(NamedTuple):
    """One image."""

    source: str
    """Name of its source."""
    name: str
    """Path relative to the source, or the number in it."""
    label: str | None
    """Class."""
    split: str
    """One of SPLITS."""
    sha256: str
    """Hash of the file, of the encoded image, or of an array's numbers."""


class SkippedImage(NamedTuple):
    """An image that could not be read."""

    source: str
    """Name of its source."""
    name: str
    """Path relative to the source, or the number in it."""
    reason: str
    """What the decoder or the file system said."""


def as_lines(records: Iterable[ImageRecord | SkippedImage]) -> bytes:
    """Return records as JSON lines."""
    return b"".join(json.dumps(record._asdict()).encode() + b"\n" for record in records)


def table_sha256(records: Sequence[ImageRecord]) -> str:
    """Return the hash of the table, which goes into the identity."""
    return hashlib.sha256(as_lines(records)).hexdigest()


def write_table(
    path: Path, records: Sequence[ImageRecord], skipped: Sequence[SkippedImage]
) -> None:
    """Write both files beside a cache's arrays, unless another writer has."""
    table = as_lines(records)
    with io.lock(path / LOCKS / "images.lock", f"the images of {path}", wait_s=float("inf")):
        if not (path / IMAGE_TABLE).exists() or (path / IMAGE_TABLE).read_bytes() != table:
            io.write_files({path / SKIPPED: as_lines(skipped), path / IMAGE_TABLE: table})


def read_images(cache: ActivationCache) -> list[ImageRecord]:
    """Return what is known of each image of a cache, in the order of its examples.

    Raises:
        CacheFormatError: If the cache is not of images, or the table is missing or damaged.
    """
    expected = cache.identity.get("images", {}).get("table_sha256")
    if expected is None:
        raise CacheFormatError(f"{cache.path} must be a cache of images, got one of text")
    file = cache.path / IMAGE_TABLE
    data = file.read_bytes() if file.is_file() else b""
    result = hashlib.sha256(data).hexdigest()
    if result != expected:
        raise CacheFormatError(
            f"{file} must have sha256 {expected}, got {result if data else 'no such file'}; "
            f"run `sae verify {cache.path} --mend` and then `sae cache` again"
        )
    return [ImageRecord(**json.loads(line)) for line in data.splitlines()]


def read_skipped(cache: ActivationCache) -> list[SkippedImage]:
    """Return the images that could not be read when the cache was built."""
    data = (cache.path / SKIPPED).read_bytes()
    return [SkippedImage(**json.loads(line)) for line in data.splitlines()]


_In = TypeVar("_In")
_Out = TypeVar("_Out")

_AT_ONCE = 256

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PickedImages:
    """The images of a cache."""

    records: Sequence[ImageRecord]
    """What is known of each, in the order of the examples."""
    skipped: Sequence[SkippedImage]
    """Images that would have been chosen and cannot be read."""
    source_names: tuple[str, ...]
    """One name for each source: the last part of its path."""
    label_names: tuple[str, ...]
    """Classes of all images of the sources, sorted; the same for every number of rows."""
    stores: Sequence[ImageStore]
    """The sources, open."""
    places: Sequence[tuple[int, int]]
    """For each example, the number of its store and its number there."""

    def image(self, example: int) -> Image.Image:
        """Return an image, decoded."""
        store, index = self.places[example]
        return self.stores[store].image(index)


def pick(
    config: ImagesConfig, *, n_rows: int, rows_per_image: int, progress: Progress | None = None
) -> PickedImages:
    """Choose enough images for `n_rows` rows of explain and score, and those of hold among them.

    More rows of the same sources and seed only add images.

    Args:
        config: Sources, fractions and seed.
        n_rows: Rows wanted from explain and score together, at least.
        rows_per_image: Rows that each image gives.
        progress: Called while images are hashed and while they are tried.

    Raises:
        FileNotFoundError: If a source does not exist.
        ValueError: If a source is not what it should be, or there are too few images.
    """
    stores = [open_store(source) for source in config.sources]
    with careful_pillow(), ThreadPoolExecutor() as pool:
        chooser = _Chooser(config, stores, pool, progress or silent)
        chosen = chooser.choose(n_rows, rows_per_image)
    if chooser.skipped:
        first = chooser.skipped[0]
        _log.warning(
            "%d images cannot be read and are left out, the first is %s of %s: %s",
            *(len(chooser.skipped), first.name, first.source, first.reason),
        )
    return PickedImages(
        records=[chooser.record(result) for result in chosen],
        skipped=chooser.skipped,
        source_names=chooser.source_names,
        label_names=tuple(sorted({n for s in stores for n in s.labels if n is not None})),
        stores=stores,
        places=[(result.store, result.number) for result in chosen],
    )


def read_pixels(
    preprocessing: Preprocessing, image: Callable[[int], Image.Image], examples: Iterable[int]
) -> Float32[np.ndarray, "example 3 size size"]:
    """Return the pixels of some examples, which are decoded in threads.

    Args:
        preprocessing: What is done to each image.
        image: Gives the image of an example.
        examples: Numbers of examples.
    """
    with careful_pillow(), ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(lambda example: preprocessing(image(example)), examples)))


class _SeenImage(NamedTuple):
    """An image whose bytes have been seen."""

    store: int
    number: int
    sha256: str


class _Chooser:
    """Hashes all images and takes readable ones, split by split."""

    def __init__(
        self,
        config: ImagesConfig,
        stores: Sequence[ImageStore],
        pool: Executor,
        progress: Progress,
    ):
        self._config, self._stores = config, stores
        self._pool, self._progress = pool, progress
        self.source_names = _names([source.path for source in config.sources])
        self.skipped: list[SkippedImage] = []

    def choose(self, n_rows: int, rows_per_image: int) -> list[_SeenImage]:
        """Return images in their order, up to the one that makes those to train on enough."""
        order = sorted(
            self._hashed(), key=lambda f: (_draw(self._config.seed, "order", f.sha256), f)
        )
        n_wanted, n_training, start = math.ceil(n_rows / rows_per_image), 0, 0
        taken: list[_SeenImage] = []
        while n_training < n_wanted and start < len(order):
            # Never more than are missing, so that none is taken in vain.
            batch = order[start : start + min(n_wanted - n_training, _AT_ONCE)]
            start += len(batch)
            readable = self._readable(batch)
            taken += readable
            n_training += sum(self._split(image.sha256) in TRAINING_SPLITS for image in readable)
            self._progress(n_training, n_wanted, "images chosen")
        if n_training < n_wanted:
            gives = n_training * rows_per_image
            raise MonosemaError(
                f"images must give at least {n_rows} rows of explain and score, got {gives}, from "
                f"{len(taken)} images beside {len(self.skipped)} that cannot be read; lower "
                f"cache.n_rows{f' to {gives}' if gives else ''} or add images"
            )
        return taken

    def record(self, result: _SeenImage) -> ImageRecord:
        """Return what is written down of an image."""
        store = self._stores[result.store]
        return ImageRecord(
            source=self.source_names[result.store],
            name=store.names[result.number],
            label=store.labels[result.number],
            split=self._split(result.sha256),
            sha256=result.sha256,
        )

    def _hashed(self) -> list[_SeenImage]:
        places = [(s, i) for s, store in enumerate(self._stores) for i in range(len(store.names))]
        result: list[_SeenImage] = []
        results = _mapped(self._pool, self._digest, places)
        for done, (place, (digest, reason)) in enumerate(zip(places, results, strict=True), 1):
            if reason is None:
                result.append(_SeenImage(*place, digest))
            else:
                self._skip(*place, reason)
            if done % _AT_ONCE == 0 or done == len(places):
                self._progress(done, len(places), "images hashed")
        return result

    def _digest(self, place: tuple[int, int]) -> tuple[str, str | None]:
        """Return the hash of an image's bytes, and why there is none."""
        store, index = place
        try:
            return hashlib.sha256(self._stores[store].data(index)).hexdigest(), None
        except UNREADABLE as error:
            return "", one_line(error)

    def _readable(self, images: Sequence[_SeenImage]) -> list[_SeenImage]:
        """Return the images that can be read, and list the others."""
        reasons = list(self._pool.map(self._problem, images))
        for image, reason in zip(images, reasons, strict=True):
            if reason is not None:
                self._skip(image.store, image.number, reason)
        return [image for image, reason in zip(images, reasons, strict=True) if reason is None]

    def _problem(self, result: _SeenImage) -> str | None:
        try:
            as_rgb(self._stores[result.store].image(result.number), (0, 0, 0))
        except UNREADABLE as error:
            return one_line(error)
        return None

    def _skip(self, store: int, index: int, reason: str) -> None:
        name = self._stores[store].names[index]
        self.skipped.append(SkippedImage(self.source_names[store], name, reason))

    def _split(self, sha256: str) -> str:
        config = self._config
        drawn = int.from_bytes(_draw(config.seed, "split", sha256)) / 2**64
        if drawn < config.explain:
            return "explain"
        return "score" if drawn < config.explain + config.score else "hold"


def _mapped(pool: Executor, fn: Callable[[_In], _Out], items: Sequence[_In]) -> Iterator[_Out]:
    """Apply a function in threads, a few hundred items at a time."""
    for start in range(0, len(items), _AT_ONCE):
        yield from pool.map(fn, items[start : start + _AT_ONCE])


def _draw(*parts: object) -> bytes:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()


def _names(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the last part of each path, numbered where two are the same."""
    names = [PurePosixPath(path).stem for path in paths]
    repeats = [names[:i].count(name) for i, name in enumerate(names)]
    return tuple(f"{name}#{n + 1}" if n else name for name, n in zip(names, repeats, strict=True))
