"""What a cache remembers of its images: `images.jsonl`, one line for each example, in order.

The hash of this file is part of the cache's identity, so the images cannot be mixed up. Images that
could not be read are in `skipped_images.jsonl`, which is only for information.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from activations_cache import io
from activations_cache.errors import CacheFormatError
from activations_cache.layout import IMAGE_TABLE
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
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise CacheFormatError(
            f"{file} must have sha256 {expected}, got {found if data else 'no such file'}; "
            "remove manifest.json and build again"
        )
    return [ImageRecord(**json.loads(line)) for line in data.splitlines()]


def read_skipped(cache: ActivationCache) -> list[SkippedImage]:
    """Return the images that could not be read when the cache was built."""
    data = (cache.path / SKIPPED).read_bytes()
    return [SkippedImage(**json.loads(line)) for line in data.splitlines()]
