"""Building a cache: a model reads text or images, and what passes its hook points is stored.

A model and what it reads, as the source of rows that `build` and `stream` share.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from activations_cache import io
from activations_cache.checks import (
    PACKAGE,
    CacheFormatError,
    MonosemaError,
    Progress,
    locate,
    silent,
)
from activations_cache.config import CacheConfig, parse_hook_point
from activations_cache.hooks import capture
from activations_cache.image_rows import ImageRows, image_widths
from activations_cache.isolation import Way, read_documents
from activations_cache.journal import first_difference, journals_at, newest
from activations_cache.layout import STORAGE
from activations_cache.manifest import Plan, read_manifest, read_plan
from activations_cache.models import LoadedModel, load_model, n_embeddings, require_positions
from activations_cache.probe import way_of
from activations_cache.reader import ActivationCache, open_cache
from activations_cache.shard import Examples, ShardBuffer
from activations_cache.shared_text import forget, packed_once
from activations_cache.text import PackedText, pack
from activations_cache.tokens import special_ids, token_ids
from activations_cache.vision import LoadedVisionModel, load_vision_model
from activations_cache.writer import CacheWriter

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
        self._way: Way | None
        self._way, self._is_causal = way_of(loaded.model, apart=packed.segments is not None)
        self.examples, self._skipped = _examples(packed), packed.skipped
        self._special = special_ids(loaded.tokenizer)
        self.plan = Plan(
            made_from={
                "model": loaded.identity,
                "text": packed.identity,
                "contexts_per_forward": config.contexts_per_forward,
                # Position ids are the way of all caches that say nothing of it.
                **({"documents": self._way} if self._way == "rows" else {}),
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
            exclude_tokens=packed.exclude_tokens,
            request=request_of(config),
        )

    def keep(self, numbers: Int[Tensor, " kept"], why: str) -> None:
        """Forget all examples but these; `why` tells the rest from the whole."""
        self.examples, self.plan = self.examples.some(numbers), self.plan.only(len(numbers), why)

    def __call__(self, numbers: range) -> Mapping[str, Float[Tensor, "example pos _"]]:
        """Run the model on some examples."""
        device = self._loaded.model.device
        with capture(self._loaded.model, self._hook_points) as run:

            def on_device(ids: Tensor, **options: Tensor) -> Mapping[str, Tensor]:
                return run(ids.to(device), **{n: t.to(device) for n, t in options.items()})

            some = slice(numbers.start, numbers.stop)
            return read_documents(
                on_device, self.examples, some, self._way, is_causal=self._is_causal
            )

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the model came from and where it runs."""
        device = self._loaded.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        occurring = np.unique(self.examples.tokens.numpy()).tolist()
        special = [token for token in occurring if token in self._special]
        found = {"model": self._loaded.provenance, "device": name, "special_tokens": special}
        return found | ({"skipped_records": self._skipped} if self._skipped else {})


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
    config: CacheConfig, loaded: AnyModel, progress: Progress, path: Path | None = None
) -> ModelSource | ImageRows:
    """Prepare the text or the images of a configuration for its model, which is loaded already.

    Text is packed once for all processes that build the cache at `path`.
    """
    if isinstance(loaded, LoadedVisionModel):
        return ImageRows(config, loaded, request_of(config), progress)
    assert config.text is not None, "a language model is loaded for text alone"
    n_ids = n_embeddings(loaded)
    require_positions(config.text.context, loaded)
    how = partial(
        pack,
        config.text,
        loaded.tokenizer,
        n_rows=config.n_rows,
        skip_positions=config.skip_positions,
        exclude_tokens=token_ids(config.exclude_tokens, loaded.tokenizer, n_ids),
        n_ids=n_ids,
        progress=progress,
    )
    made_from = {"request": request_of(config), "model": loaded.identity}
    packed = how() if path is None else packed_once(path, made_from, how)
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
    if not config.exclude_tokens:  # as it was before there was such a key
        del given["exclude_tokens"]
    for source in given.get("text", {}).get("sources", ()):
        for key in ("special_tokens", "shuffle_buffer"):
            if not source[key]:
                del source[key]
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
        raise MonosemaError(
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


_RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


def build(
    config: CacheConfig, path: str | Path, *, progress: Progress | None = None
) -> ActivationCache:
    """Build the cache that a configuration describes, or go on building it, or just open it.

    Several processes may build one cache: under torchrun or SLURM each takes its share of the
    shards, and the last one finishes. A complete cache of the same configuration is opened without
    loading the model.

    Args:
        config: Model, text or images, hook points and sizes.
        path: The cache's directory: new, empty, or begun by the same configuration.
        progress: Called with rows done and rows in all after every forward.

    Raises:
        CacheBusyError: If another live process builds here under the same rank.
        CacheFormatError: If the directory holds something else; the message names the key.
        DiskFullError: If the cache will not fit, or the disk becomes full.
        NonFiniteError: If too many rows are not finite.
    """
    path, progress = Path(path), progress or silent
    if _is_complete(path, config):
        return open_cache(path)
    _require_space(config, path, _width_by_config(config))
    loaded = load_on_device(config, progress)
    _require_space(config, path, sum(widths(config, loaded).values()))
    rank, n_ranks = rank_of_this_process()
    source = load_source(config, loaded, progress, path if n_ranks > 1 else None)
    with CacheWriter(path, source.plan, rank=rank, progress=progress) as writer:
        write_shards(writer, source, config.contexts_per_forward, n_ranks, progress)
        if isinstance(source, ImageRows):
            source.write_table(path)
        writer.finish(source.provenance)
    forget(path)
    return open_cache(path)


def write_shards(
    writer: CacheWriter,
    source: RowSource,
    contexts_per_forward: int,
    n_ranks: int,
    progress: Progress,
) -> None:
    """Write shards until none is missing."""
    plan = source.plan
    total = plan.n_examples * plan.rows_per_example
    for shard in writer.claims(n_ranks):
        before = sum(r.valid_rows + r.n_quarantined for r in writer.committed().values())
        buffer = ShardBuffer(plan, shard, source.examples)
        for numbers in forward_ranges(plan.examples_of(shard), contexts_per_forward):
            buffer.add(numbers, source(numbers))
            progress(before + buffer.n_rows + len(buffer.quarantined), total, "rows")
        writer.commit(buffer)


def rank_of_this_process() -> tuple[int, int]:
    """Return the rank and the number of ranks that torchrun or SLURM set, or (0, 1).

    Raises:
        ValueError: If the variables do not fit together.
    """
    for rank_name, n_ranks_name in _RANKS:
        if n_ranks_name in os.environ:
            rank, n_ranks = int(os.environ.get(rank_name, "0")), int(os.environ[n_ranks_name])
            if not 0 <= rank < n_ranks:
                raise MonosemaError(
                    f"{rank_name} must be below {n_ranks_name}={n_ranks}, got {rank}"
                )
            return rank, n_ranks
    return 0, 1


def _is_complete(path: Path, config: CacheConfig) -> bool:
    """Say whether this cache is there already; refuse a directory of another request."""
    there = _plan_at(path)
    if there is None:
        return False
    difference = first_difference(request_of(config), there.request)
    if difference is not None:
        raise CacheFormatError(
            f"{path} must be built from this configuration, got another {difference}; "
            "choose another directory or remove this one"
        )
    if read_manifest(path) is None:
        return False
    records = newest(journals_at(path)).values()
    sizes = ((n, {"bytes": f["bytes"]}) for r in records for n, f in r.files.items())
    return all(io.problem(path / name, size) is None for name, size in sizes)


def _plan_at(path: Path) -> Plan | None:
    manifest = read_manifest(path)
    return manifest.plan if manifest is not None else read_plan(path)


def _require_space(config: CacheConfig, path: Path, width: int) -> None:
    """Refuse what cannot fit, by a lower bound of its size, before the slow part."""
    if config.compression != "none":  # nobody knows how far it will go
        return
    if _plan_at(path) is not None:  # part of it is there; the writer counts what is missing
        return
    n_rows = math.ceil(config.n_rows / (1 - config.data.hold))
    io.require_space(path, n_rows * width * np.dtype(STORAGE[config.dtype][1]).itemsize)


def _width_by_config(config: CacheConfig) -> int:
    """Return the sum of the hook points' widths as far as a local config.json tells them.

    It tells that of whole blocks, whose module paths end in a number.
    """
    file = Path(config.model.path) / "config.json"
    if not file.is_file():
        return 0
    try:
        entries = json.loads(file.read_bytes())
        part = "text_config" if config.images is None else "vision_config"
        d_model = int(entries.get(part, entries)["hidden_size"])
    except (AttributeError, KeyError, TypeError, ValueError):  # loading the model will tell
        return 0
    blocks = [p for p in config.hook_points if parse_hook_point(p)[0].split(".")[-1].isdigit()]
    return d_model * len(blocks)
