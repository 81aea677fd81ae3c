"""From the bytes of a file to an image: what is decoded, and what damaged bytes raise."""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator

from PIL import Image, ImageOps

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Files of a folder that are taken for images; others are not looked at."""

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, whatever a file is called: Pillow reads others by running Ghostscript."""

UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise for damaged bytes, and the file system for files out of reach."""


def decode(data: bytes) -> Image.Image:
    """Return an encoded image, all of it read, turned as its EXIF entry says; of several the first.

    Raises:
        OSError: If the bytes are no whole image; of other errors see UNREADABLE.
    """
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    image.load()
    return ImageOps.exif_transpose(image)


@contextlib.contextmanager
def careful_pillow() -> Iterator[None]:
    """Silence Pillow's remarks on files that it can read, and refuse images of absurd size.

    Not for use in a thread, as warnings are one for all; threads started inside are covered.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
