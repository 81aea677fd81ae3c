"""Vision models: towers of transformers, timm and open_clip, and how each reads images.

Which library a directory is for follows from its files: `model_type` in config.json is of
transformers, `architecture` of timm, and open_clip has a file of its own.
"""

import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import transformers
from torch import nn

from activations_cache.checks import MonosemaError, Progress, require_extra, silent
from activations_cache.config import ImagePreprocessing, ModelConfig
from activations_cache.loading import ModelError, Refusing, quiet
from activations_cache.models import (
    LoadedModel,
    compile_blocks,
    files_of,
    load_model,
    provenance_of,
    read_model,
)
from activations_cache.preprocessing import read_settings


@dataclass(frozen=True)
class TowerFamily:
    """Vision towers of one kind in transformers."""

    tower: str
    """The class that holds the tower alone."""
    has_class_token: bool = True
    """Whether a class token stands before the patches; registers, if any, follow it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the class needs to be told when it is loaded."""


_CLIP, _SIGLIP = (
    TowerFamily("CLIPVisionModel"),
    TowerFamily("SiglipVisionModel", has_class_token=False),
)

FAMILIES = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "dinov2": TowerFamily("Dinov2Model"),
    "dinov2_with_registers": TowerFamily("Dinov2WithRegistersModel"),
    "dinov3_vit": TowerFamily("DINOv3ViTModel"),
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "vit": TowerFamily("ViTModel", options={"add_pooling_layer": False}),
}
"""By `model_type` in config.json; one entry adds a family."""


@dataclass(frozen=True, kw_only=True)
class ImageReading:
    """How a model reads images: what its stream has at which position."""

    patch: int
    """Height and width of a patch in pixels."""
    n_prefix: int
    """Positions before the first patch: class token and registers."""
    has_class_token: bool
    """Whether position 0 is a class token."""
    image_size: int
    """Height and width that the model was made for."""
    resizes: Literal["by itself", "if asked", "never"]
    """Whether it interpolates its positions when it reads another size."""

    def n_positions(self, size: int) -> int:
        """Return the length of the stream for images of a size.

        Raises:
            ValueError: If the model cannot read them.
        """
        if size % self.patch:
            rule = f"be a multiple of the patch's {self.patch} pixels"
            raise MonosemaError(f"preprocessing.size must {rule}, got {size}")
        if self.resizes == "never" and size != self.image_size:
            rule = f"be {self.image_size}, as this model's positions are fixed"
            raise MonosemaError(f"preprocessing.size must {rule}, got {size}")
        return self.n_prefix + (size // self.patch) ** 2

    def options(self, size: int) -> dict[str, bool]:
        """Return the further arguments of a forward on images of a size."""
        asks = self.resizes == "if asked" and size != self.image_size
        return {"interpolate_pos_encoding": True} if asks else {}


@dataclass(frozen=True)
class LoadedVisionModel:
    """A vision tower ready to be read: in evaluation mode, without gradients for its weights."""

    model: nn.Module
    """The tower; called with pixels of shape (image, 3, size, size)."""
    reading: ImageReading
    """What its stream holds."""
    settings: ImagePreprocessing
    """What its files say about images."""
    identity: dict[str, str]
    """What the activations depend on, as hashes; the same wherever the files lie."""
    provenance: dict[str, str]
    """The path that was asked for, and the commit where it is a hub id; never compared."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return next(self.model.parameters()).dtype


def load_vision_model(
    config: ModelConfig, *, progress: Progress | None = None
) -> LoadedVisionModel:
    """Load the vision tower that a configuration names.

    Of a model with two towers only that for images is read. An ONNX file of DINOv2 is converted at
    its first use (`activations_cache.conversion`).

    Args:
        config: Which model, what its weights must hash to, and the dtype.
        progress: Called while weights are hashed and converted.

    Raises:
        FileNotFoundError: If the named file or package does not exist.
        ModelError: If it cannot be read, lacks weights, is of an unknown family, or has
            another hash.
        MissingPackageError: If the library that it is for is missing.
        ValueError: If it is to lie on several devices, and is not of transformers.
    """
    directory, identity = files_of(config, progress or silent)
    entries = _entries(directory)
    library = _library_of(entries)
    if config.devices != "one" and library != "transformers":
        rule = f"model.devices must be one for a vision model of {library}"
        raise MonosemaError(f"{rule}, got {config.devices!r}")
    rule = f"model {config.path} must be a vision model that can be read"
    with Refusing(rule, "check its files"), quiet():
        if library == "open_clip":
            name, model, reading = _open_clip(directory)
        elif library == "timm":
            name, model, reading = _timm(directory, entries["architecture"])
        else:
            name, model, reading = _transformers(directory, config, entries)
        model = model.to(getattr(torch, config.dtype)).eval().requires_grad_(False)
        settings = read_settings(directory)
    if settings.size is None:
        settings = replace(settings, size=reading.image_size)
    identity |= {"model": name, "dtype": config.dtype}
    if config.compile:
        compile_blocks(model)
        identity["compiled"] = "blocks"
    return LoadedVisionModel(model, reading, settings, identity, provenance_of(config, directory))


def load_any_model(
    config: ModelConfig, *, progress: Progress | None = None
) -> LoadedModel | LoadedVisionModel:
    """Load a vision tower if that is what the files hold, and else a language model.

    Raises:
        FileNotFoundError: If the named file or package does not exist.
        ModelError: If it cannot be read.
    """
    entries = _entries(files_of(replace(config, sha256=None), silent)[0])
    # CLIP and SigLIP have a text tower as well, but no language model.
    is_vision = entries.get("model_type", "") in FAMILIES or not entries.get("model_type")
    return (load_vision_model if is_vision else load_model)(config, progress=progress)


def _entries(directory: Path) -> dict[str, Any]:
    """Return config.json; `files_of` has seen to it that one of the two files can be read."""
    if (file := directory / "config.json").is_file():
        return json.loads(file.read_bytes())
    return {"open_clip": True}


def _library_of(entries: Mapping[str, Any]) -> Literal["transformers", "timm", "open_clip"]:
    if "open_clip" in entries:
        return "open_clip"
    is_timm = "model_type" not in entries and "architecture" in entries
    return "timm" if is_timm else "transformers"


def _transformers(
    directory: Path, config: ModelConfig, entries: Mapping[str, Any]
) -> tuple[str, nn.Module, ImageReading]:
    family = FAMILIES.get(entries.get("model_type", "none"))
    if family is None:
        known = ", ".join(FAMILIES)
        raise ModelError(
            f"model_type in config.json must be one of {known} for a vision model, "
            f"got {entries.get('model_type', 'none')}"
        )
    tower = getattr(transformers, family.tower)
    spread = {"device_map": "auto"} if config.devices == "all" else {}
    model = read_model(directory, config, tower, **family.options, **spread)
    tower_config = getattr(model.config, "vision_config", model.config)
    asks = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    reading = ImageReading(
        patch=_side(tower_config.patch_size),
        n_prefix=int(family.has_class_token)
        + (getattr(tower_config, "num_register_tokens", None) or 0),
        has_class_token=family.has_class_token,
        image_size=_side(tower_config.image_size),
        resizes="if asked" if asks else "by itself",
    )
    return family.tower, model, reading


def _timm(directory: Path, architecture: str) -> tuple[str, nn.Module, ImageReading]:
    timm = _package("timm")
    model = timm.create_model(
        f"local-dir:{directory}", pretrained=True, num_classes=0, dynamic_img_size=True
    )
    return f"timm/{architecture}", model, _timm_reading(model, resizes="by itself")


def _open_clip(directory: Path) -> tuple[str, nn.Module, ImageReading]:
    tower = _package("open_clip").create_model(f"local-dir:{directory}").visual
    if hasattr(tower, "trunk"):  # a tower that open_clip takes from timm
        return "open_clip/timm", tower.trunk, _timm_reading(tower.trunk, resizes="never")
    reading = ImageReading(
        patch=_side(tower.patch_size),
        n_prefix=1,
        has_class_token=True,
        image_size=_side(tower.image_size),
        resizes="never",
    )
    return f"open_clip/{type(tower).__name__}", tower, reading


def _timm_reading(model: Any, resizes: Literal["by itself", "never"]) -> ImageReading:
    return ImageReading(
        patch=_side(model.patch_embed.patch_size),
        n_prefix=model.num_prefix_tokens,
        has_class_token=getattr(model, "cls_token", None) is not None,
        image_size=_side(model.patch_embed.img_size),
        resizes=resizes,
    )


def _side(size: Any) -> int:
    """Return the side of a square that is given as a number or as height and width."""
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1:
        raise ModelError(f"patches and images must be squares, got {size}")
    return int(sides.pop())


def _package(name: str) -> ModuleType:
    require_extra(name, "this model", "timm")
    return importlib.import_module(name)
