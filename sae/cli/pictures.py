"""Thumbnails of a cache's images, as the browser takes them."""

import io
from collections.abc import Iterable, Iterator

from activations_cache import ActivationCache
from activations_cache.image_rows import CachedImages
from activations_cache.preprocessing import as_rgb
from sae.browser import Image

LONGEST = 224
"""Pixels of a thumbnail's side, at most."""
QUALITY = 80


class Pictures:
    """What the model saw of a cache's images: the square that its patches lie on.

    Args:
        cache: A cache of images.

    Raises:
        FileNotFoundError: If the images are not there any more.
    """

    def __init__(self, cache: ActivationCache) -> None:
        self._images = CachedImages(cache)
        self._size = min(LONGEST, self._images.preprocessing.size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self._images.grid

    def image(self, example: int) -> Image:
        """What the browser needs to know of an image."""
        name, grid = self._images.records[example].name, self._images.grid
        return Image(number=example, name=name, grid=grid, width=self._size, height=self._size)

    def jpegs(self, examples: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """Numbers and JPEG bytes, one image in memory at a time."""
        made = self._images.preprocessing
        for example in examples:
            image = made.square(as_rgb(self._images.image(example), made.background))
            out = io.BytesIO()
            image.resize((self._size, self._size)).save(out, "JPEG", quality=QUALITY)
            yield example, out.getvalue()
