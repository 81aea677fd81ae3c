"""The images that a finished cache was made from, read again from where they lay."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from activations_cache.config_images import ImageSource
from activations_cache.errors import CacheFormatError
from activations_cache.image_sources import open_store
from activations_cache.image_table import read_images
from activations_cache.images import read_pixels
from activations_cache.preprocessing import Preprocessing
from activations_cache.reader import ActivationCache


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
