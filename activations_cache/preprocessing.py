"""From an image to the pixels that a model reads, with Pillow and NumPy alone.

The order is that of the usual image processors: resize the 8-bit image, cut out the middle, scale
to 0..1, normalise.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32
from PIL import Image

from activations_cache.config import ImagePreprocessing, Interpolation
from activations_cache.loading import ModelError, one_line
from monosema.checks import MonosemaError

_T = TypeVar("_T")

_FILTERS: dict[Interpolation, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
_LONGEST = 100
_IDENTITY = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
_PLAIN_MODES = {"1", "L", "P", "RGB", "RGBA", "LA", "PA", "La", "RGBa", "RGBX", "CMYK", "YCbCr"}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What is done to each image, with nothing left open."""

    size: int
    """Height and width of the result, in pixels."""
    shortest_edge: int | None
    """Length of the shorter side before the middle is cut out; None: squeezed into the square."""
    interpolation: Interpolation
    """How pixels are mixed when the image is resized."""
    mean: tuple[float, float, float]
    """What is subtracted from red, green and blue, which go from 0 to 1."""
    std: tuple[float, float, float]
    """By what they are divided then."""
    background: tuple[int, int, int]
    """Colour behind transparent pixels."""

    def __call__(self, image: Image.Image) -> Float32[np.ndarray, "3 size size"]:
        """Return the pixels of an image: red, green and blue, normalised.

        Raises:
            ValueError: If the image has no colours, or is a mere line.
        """
        image = as_rgb(image, self.background)
        values = np.asarray(self.square(image), np.float64) / 255
        return ((values - self.mean) / self.std).transpose(2, 0, 1).astype(np.float32)

    def square(self, image: Image.Image) -> Image.Image:
        """Return the part of an RGB image that the model sees, in the size in which it does."""
        if self.shortest_edge is None:
            return image.resize((self.size, self.size), _FILTERS[self.interpolation])
        short, edge = min(image.size), self.shortest_edge
        width, height = (edge if s == short else int(edge * s / short) for s in image.size)
        image = image.resize((width, height), _FILTERS[self.interpolation])
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))


def as_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return an image in RGB, laid on a background where it is transparent.

    Raises:
        ValueError: If its numbers are no colours, such as 32-bit floats, or if it is a mere line,
            which would take gigabytes once its shorter side has the usual length.
    """
    if max(image.size) > _LONGEST * min(image.size):
        sides = f"{image.width} x {image.height}"
        raise MonosemaError(
            f"no side may be over {_LONGEST} times as long as the other, got {sides}"
        )
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in _PLAIN_MODES:
        raise MonosemaError(f"the colour mode must be an 8-bit or 16-bit one, got {image.mode}")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert(
        "RGB"
    )


def resolve(asked: ImagePreprocessing, result: ImagePreprocessing) -> Preprocessing:
    """Complete what is asked for by what the model's own settings say.

    Raises:
        ValueError: If neither says what there is no safe guess for.
    """
    size = _first("size", asked.size, result.size)
    return Preprocessing(
        size=size,
        shortest_edge=_shortest_edge(asked, result, size),
        interpolation=asked.interpolation or result.interpolation or "bicubic",
        mean=_first("mean", asked.mean, result.mean),
        std=_first("std", asked.std, result.std),
        background=asked.background,
    )


def read_settings(directory: Path) -> ImagePreprocessing:
    """Return what the files of a model say about its images; empty where they say nothing.

    Args:
        directory: A model in the format of transformers, timm or open_clip.

    Raises:
        ModelError: If the settings are damaged, or ask for what is not done here.
    """
    readers: dict[str, Callable[[Mapping[str, Any]], ImagePreprocessing]] = {
        "preprocessor_config.json": _of_transformers,
        "processor_config.json": lambda entries: _of_transformers(entries["image_processor"]),
        "open_clip_config.json": _of_open_clip,
        "config.json": _of_timm,
    }
    for name, read in readers.items():
        file = directory / name
        if not file.is_file():
            continue
        try:
            return read(json.loads(file.read_bytes()))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{file} must hold settings for images that can be followed, got {one_line(error)}"
            ) from error
    return ImagePreprocessing()


def _first(name: str, *values: _T | None) -> _T:
    for value in values:
        if value is not None:
            return value
    raise MonosemaError(
        f"preprocessing.{name} must be given where the model comes without settings for images, "
        "got nothing"
    )


def _shortest_edge(asked: ImagePreprocessing, result: ImagePreprocessing, size: int) -> int | None:
    """Return the asked one, or the model's in proportion to the size."""
    crop = asked.crop if asked.crop is not None else result.crop
    if asked.shortest_edge is not None:
        if asked.shortest_edge < size:
            rule = f"be at least the size {size}"
            raise MonosemaError(
                f"preprocessing.shortest_edge must {rule}, got {asked.shortest_edge}"
            )
        return asked.shortest_edge
    if crop is False:
        return None
    if result.shortest_edge is None or result.size is None:
        return size
    return round(result.shortest_edge * size / result.size)


def _of_transformers(entries: Mapping[str, Any]) -> ImagePreprocessing:
    crop = bool(entries.get("do_center_crop", False))
    given = entries["size"]
    size = given if isinstance(given, Mapping) else {"shortest_edge" if crop else "height": given}
    edge = size.get("shortest_edge")
    side = _square(entries.get("crop_size", edge)) if crop else (edge or _square(size))
    # (v * factor - mean) / std, where v goes to 255, in terms of v / 255.
    factor = float(entries.get("rescale_factor", 1 / 255)) if entries.get("do_rescale", 1) else 1.0
    normal = entries if entries.get("do_normalize", True) else _IDENTITY
    resample = Image.Resampling(entries.get("resample", Image.Resampling.BILINEAR))
    return ImagePreprocessing(
        size=side,
        crop=edge is not None,
        shortest_edge=edge,
        interpolation=next(name for name, value in _FILTERS.items() if value == resample),
        mean=_rgb(normal["image_mean"], 255 * factor),
        std=_rgb(normal["image_std"], 255 * factor),
    )


def _of_timm(entries: Mapping[str, Any]) -> ImagePreprocessing:
    if "pretrained_cfg" not in entries:  # a model of transformers without settings for images
        return ImagePreprocessing()
    settings = entries["pretrained_cfg"]
    size, mode = _square(settings["input_size"][1:]), settings.get("crop_mode") or "center"
    if mode != "center" and not (mode == "squash" and settings["crop_pct"] == 1):
        raise MonosemaError(f"crop_mode must be center, got {mode}")
    return ImagePreprocessing(
        size=size,
        crop=mode == "center",
        shortest_edge=math.floor(size / settings["crop_pct"]) if mode == "center" else None,
        interpolation=settings["interpolation"],
        mean=_rgb(settings["mean"]),
        std=_rgb(settings["std"]),
    )


def _of_open_clip(entries: Mapping[str, Any]) -> ImagePreprocessing:
    settings = entries["preprocess_cfg"]
    size = _square(settings.get("size") or entries["model_cfg"]["vision_cfg"]["image_size"])
    mode = settings.get("resize_mode", "shortest")
    if mode not in {"shortest", "squash"}:
        raise MonosemaError(f"resize_mode must be shortest or squash, got {mode}")
    return ImagePreprocessing(
        size=size,
        crop=mode == "shortest",
        shortest_edge=size if mode == "shortest" else None,
        interpolation=settings.get("interpolation", "bicubic"),
        mean=_rgb(settings["mean"]),
        std=_rgb(settings["std"]),
    )


def _square(size: Any) -> int:
    """Return the side of a square given as a number, a pair, or height and width."""
    if isinstance(size, Mapping):
        size = [size["height"], size.get("width", size["height"])]
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1:
        raise MonosemaError(f"size must be a square, got {size}")
    return int(sides.pop())


def _rgb(values: Any, divisor: float = 1.0) -> tuple[float, float, float]:
    red, green, blue = [values] * 3 if isinstance(values, float) else values
    return float(red) / divisor, float(green) / divisor, float(blue) / divisor
