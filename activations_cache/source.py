"""A model and what it reads, as the source of rows that `build` and `stream` share."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from activations_cache.config import CacheConfig
from activations_cache.hooks import capture
from activations_cache.image_rows import ImageRows, image_widths
from activations_cache.locations import PACKAGE, locate
from activations_cache.manifest import Plan
from activations_cache.models import LoadedModel, load_model
from activations_cache.progress import Progress
from activations_cache.shard import Examples
from activations_cache.text import PackedText, pack
from activations_cache.vision import LoadedVisionModel, load_vision_model

_STAMP_BYTES = 1 << 20
_MAX_LABELS = 2**15
_FILES = (".gguf", ".gz", ".jsonl", ".npy", ".onnx", ".parquet", ".tar", ".txt")

AnyModel = LoadedModel | LoadedVisionModel


@runtime_checkable
class RowSource(Protocol):
    """What gives activations: a model with its examples, or a stand-in for it."""

    plan: Plan
    """The cache that these activations make."""
    examples: Examples
    """All examples of that cache."""

    def __call__(self, numbers: range) -> Mapping[str, Float[Tensor, "example pos _"]]:
        """Return the activations of some examples by hook point."""
        ...


class ModelSource:
    """The model and the packed text of a configuration.

    Args:
        config: What to load.
        loaded: Its model.
        packed: Its text.
        d_model: Width of each hook point.
    """

    def __init__(
        self, config: CacheConfig, loaded: LoadedModel, packed: PackedText, d_model: dict[str, int]
    ) -> None:
        self._loaded = loaded
        self._hook_points = config.hook_points
        self.examples = _examples(packed)
        self.plan = Plan(
            made_from={
                "model": loaded.identity,
                "text": packed.identity,
                "contexts_per_forward": config.contexts_per_forward,
            },
            hook_points=d_model,
            dtype=config.dtype,
            compression=config.compression,
            context=packed.tokens.shape[1],
            skip_positions=config.skip_positions,
            rows_per_shard=config.rows_per_shard,
            n_examples=len(self.examples),
            source_names=packed.source_names,
            label_names=packed.label_names,
            has_segments=packed.segments is not None,
            request=request_of(config),
        )

    def __call__(self, numbers: range) -> Mapping[str, Float[Tensor, "example pos _"]]:
        """Run the model on some examples."""
        ids, positions = model_inputs(self.examples, slice(numbers.start, numbers.stop))
        device = self._loaded.model.device
        with capture(self._loaded.model, self._hook_points) as run:
            if positions is None:
                return run(ids.to(device))
            return run(ids.to(device), position_ids=positions.to(device))

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the model came from and where it runs."""
        device = self._loaded.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {"model": self._loaded.provenance, "device": name}


def model_inputs(
    examples: Examples, some: slice | Int[Tensor, " some"]
) -> tuple[Int[Tensor, "some pos"], Int[Tensor, "some pos"] | None]:
    """Return token ids and, where examples have segments, positions that begin anew in each.

    From such positions transformers makes the mask that keeps the segments apart.
    """
    ids = examples.tokens[some].clamp_min(0)  # padding stands at the end, where nothing sees it
    return ids, None if examples.segment is None else examples.positions(some)


def load_on_device(config: CacheConfig, progress: Progress) -> AnyModel:
    """Load the model of a configuration, onto the GPU of this process where there is one."""
    load = load_model if config.images is None else load_vision_model
    loaded = load(config.model, progress=progress)
    if torch.cuda.is_available() and config.model.devices == "one":
        local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        device = torch.device("cuda", int(local) % torch.cuda.device_count())
        nn.Module.to(loaded.model, device)  # the model's own `to` has no usable type
    return loaded


def load_source(
    config: CacheConfig, loaded: AnyModel, progress: Progress
) -> ModelSource | ImageRows:
    """Prepare the text or the images of a configuration for its model, which is loaded already."""
    if isinstance(loaded, LoadedVisionModel):
        return ImageRows(config, loaded, request_of(config), progress)
    assert config.text is not None, "a language model is loaded for text alone"
    packed = pack(
        config.text,
        loaded.tokenizer,
        n_rows=config.n_rows,
        skip_positions=config.skip_positions,
        progress=progress,
    )
    return ModelSource(config, loaded, packed, widths(config, loaded))


def widths(config: CacheConfig, loaded: AnyModel) -> dict[str, int]:
    """Return the width of each hook point, by running the model on two tokens or one image."""
    if isinstance(loaded, LoadedVisionModel):
        return image_widths(config, loaded)
    device = loaded.model.device
    with capture(loaded.model, config.hook_points) as run:
        given = run(torch.zeros(1, 2, dtype=torch.long, device=device))
    return {name: stream.shape[-1] for name, stream in given.items()}


def request_of(config: CacheConfig) -> dict[str, Any]:
    """Return what a caller asks for, cheaply: the configuration, and a stamp of each file."""
    paths = [config.model.path]
    if config.text is not None:
        paths += [source.path for source in config.text.sources]
    if config.images is not None:
        labels = [source.label or "" for source in config.images.sources]
        paths += [source.path for source in config.images.sources]
        paths += [label for label in labels if label.endswith(".npy")]
    given = {name: value for name, value in asdict(config).items() if value is not None}
    return {
        "config": json.loads(json.dumps(given)),
        "files": {path: _stamp(path) for path in paths if _is_local(path)},
    }


def forward_ranges(numbers: range, size: int) -> list[range]:
    """Cut the examples of a shard into those that the model reads at once."""
    return [range(start, min(start + size, numbers.stop)) for start in numbers[::size]]


def _is_local(path: str) -> bool:
    """Say whether a path is a file or directory, as opposed to a name on the hub."""
    is_file = path.endswith(_FILES)
    return path.startswith(PACKAGE) or is_file or Path(path).is_dir()


def _stamp(path: str) -> dict[str, list[int | str]] | list[int | str]:
    """Return size and hash of the ends of a file, or of each file in a directory.

    Of images in a folder, which may be very many, only names and sizes are looked at.
    """
    found = locate(path)
    if not found.is_dir():
        return _file_stamp(found)
    files = [file for file in sorted(found.iterdir()) if file.is_file()]
    known = {"config.json", "open_clip_config.json", "dataset_info.json"}
    if known & {file.name for file in files}:
        return {file.name: _file_stamp(file) for file in files}
    below = [file for file in sorted(found.rglob("*")) if file.is_file()]
    listed = "".join(f"{file.relative_to(found)}\0{file.stat().st_size}\0" for file in below)
    return [len(below), hashlib.sha256(listed.encode()).hexdigest()]


def _file_stamp(path: Path) -> list[int | str]:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_STAMP_BYTES))
        file.seek(max(0, size - _STAMP_BYTES))
        digest.update(file.read(_STAMP_BYTES))
    return [size, digest.hexdigest()]


def _examples(packed: PackedText) -> Examples:
    n_labels = len(packed.label_names)
    if n_labels > _MAX_LABELS:
        raise ValueError(
            f"label must have at most {_MAX_LABELS:,} different values, got {n_labels:,}; "
            "choose a field with fewer values"
        )
    return Examples(
        tokens=packed.tokens,
        split=packed.split,
        source=packed.source,
        source_names=packed.source_names,
        label=packed.labels if n_labels else None,
        label_names=packed.label_names,
        segment=packed.segments,
    )
