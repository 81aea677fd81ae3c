"""Which arrays a cache has, and where: a Zarr v3 group with one uncompressed file per shard.

FORMAT.md states the same in tables; tests hold the two together.

How rows are held on the disk: number formats, the 8-bit one with its scales, compression.
"""

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from activations_cache.checks import CacheFormatError
from activations_cache.journal import ShardRecord
from activations_cache.manifest import Manifest, Plan
from monosema.checks import MonosemaError

STORAGE: dict[str, tuple[torch.dtype, str]] = {
    "bfloat16": (torch.bfloat16, "uint16"),  # Zarr's readers agree on no bfloat16
    "float16": (torch.float16, "float16"),
    "float32": (torch.float32, "float32"),
    "int8": (torch.float32, "int8"),  # torch holds what will be read: number times scale
}
"""For each dtype of a cache: how torch holds a row, and how the file names its numbers."""

ZSTD_LEVEL = 3
"""Higher levels save under 1 % more of bfloat16 rows, at several times the time."""

_STEPS = 127
_SPARE_BITS = 0xFF  # of float32's mantissa: what a product with 7 bits needs to be exact


def has_scale(dtype: str) -> bool:
    """Say whether rows of a dtype are numbers times a scale of the row."""
    return dtype == "int8"


def as_read(rows: Float[Tensor, "row d_model"], dtype: str) -> Float[Tensor, "row d_model"]:
    """Round rows to what a cache of this dtype will give back.

    Returns:
        The rows in the dtype of STORAGE. Rounding a second time changes no bit.
    """
    if not has_scale(dtype):
        return rows.to(STORAGE[dtype][0])
    scale = scale_of(rows)
    return torch.round(rows.float() / scale[:, None]) * scale[:, None]


def scale_of(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
    """Return each row's scale: its largest magnitude / 127, rounded up to 16 bits of mantissa.

    With the low bits free, number times scale is exact in float32, so a row that was read and is
    stored again keeps its bits.
    """
    largest = rows.float().abs().amax(dim=1).clamp_min(_STEPS * torch.finfo(torch.float32).tiny)
    bits = (largest / _STEPS).view(torch.int32)
    return ((bits + _SPARE_BITS) & ~_SPARE_BITS).view(torch.float32)


def as_stored(rows: Float[Tensor, "row d_model"], dtype: str) -> dict[str, np.ndarray]:
    """Return the arrays `acts` and, for int8, `scale` of rows that `as_read` gave."""
    if has_scale(dtype):
        scale = scale_of(rows)
        return {
            "acts": torch.round(rows / scale[:, None]).to(torch.int8).numpy(),
            "scale": scale.numpy(),
        }
    return {"acts": bits(rows)}


def read_into(
    result: Float[Tensor, "row d_model"],
    acts: Shaped[np.ndarray, "row d_model"],
    scale: Shaped[np.ndarray, " row"] | None,
    dtype: str,
) -> None:
    """Write stored rows as float32 into `found`; `as_stored` in reverse.

    With NumPy, which stays in its thread: torch's ones would get in the way of the training step.
    """
    rows = result.numpy()
    if dtype == "bfloat16":  # the upper half of a float32
        bits = rows.view(np.uint32)
        np.copyto(bits, acts)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(rows, acts)
    if scale is not None:
        np.multiply(rows, scale[:, None], out=rows)


def bits(rows: Shaped[Tensor, "row d_model"]) -> np.ndarray:
    """Return the memory of rows in a cache's number format as NumPy names it."""
    if rows.dtype == torch.bfloat16:
        return rows.view(torch.int16).numpy().view(np.uint16)
    return rows.numpy()


def compress(data: np.ndarray) -> bytes:
    """Return an array's bytes as one Zstandard frame."""
    return bytes(
        _zstd().compress(np.ascontiguousarray(data).reshape(-1).view(np.uint8), ZSTD_LEVEL)
    )


def decompress(data: np.ndarray) -> bytes:
    """Return the bytes of a Zstandard frame.

    Raises:
        ValueError: If it is none.
    """
    try:
        return bytes(_zstd().decompress(data))
    except RuntimeError as error:
        raise MonosemaError(
            f"a compressed chunk must be one Zstandard frame, got {error}"
        ) from error


def _zstd() -> ModuleType:
    """Return the module that comes with zarr; it is slow to import, and rarely needed."""
    return importlib.import_module("numcodecs.zstd")


IMAGE_TABLE = "images.jsonl"
"""What is known of each image of a cache of images; no array, but checked like one."""

UNUSED = -1
"""In `rows/example`: this row of the shard holds nothing."""


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array; chunk i is the part of shard i, in one file."""

    path: str
    """Group and name, relative to the cache."""
    dtype: str
    """Zarr's name of the number format, which is also NumPy's; little endian."""
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    fill: int = 0
    """What fills a chunk beyond the array's end and beyond a shard's valid rows."""
    attributes: dict[str, Any] = field(default_factory=dict)
    is_compressed: bool = False
    """Whether each file is a Zstandard frame of the chunk."""

    @property
    def numpy(self) -> np.dtype:
        """The number format in NumPy's terms."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def chunk_bytes(self) -> int:
        """Size of each chunk: of its file, unless that is compressed."""
        return math.prod(self.chunk) * self.numpy.itemsize

    def file(self, shard: int) -> str:
        """Return the path of a shard's file, relative to the cache."""
        return "/".join([self.path, "c", str(shard), *["0"] * (len(self.shape) - 1)])

    def metadata(self) -> bytes:
        """Return the array's `zarr.json`."""
        codecs: list[dict[str, Any]] = [
            {"name": "bytes", "configuration": {"endian": "little"}}
            if self.numpy.itemsize > 1
            else {"name": "bytes"}
        ]
        if self.is_compressed:
            zstd = {"level": ZSTD_LEVEL, "checksum": False}
            codecs.append({"name": "zstd", "configuration": zstd})
        return _json({
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": self.fill,
            "codecs": codecs,
            "attributes": self.attributes,
        })


@dataclass(frozen=True)
class HookArrays:
    """The arrays of one hook point."""

    acts: ArraySpec
    """(row, d_model): the activations."""
    scale: ArraySpec | None
    """(row,): by what the numbers of a row are multiplied; only for int8."""
    norm: ArraySpec
    """(row,): Euclidean norm of each row as stored."""
    shard_mean: ArraySpec
    """(shard, d_model): mean of the shard's rows of the splits explain and score."""
    mean: ArraySpec
    """(d_model,): the same over the whole cache; written at the finish, in one file."""


@dataclass(frozen=True)
class Layout:
    """All arrays of a cache."""

    hooks: dict[str, HookArrays]
    rows: dict[str, ArraySpec]
    """`example`, `position`, `token`, each (row,)."""
    examples: dict[str, ArraySpec]
    """`tokens` and, if any, `label` and `segment` (example, pos); `split`, `source` (example,)."""

    def per_shard(self) -> list[ArraySpec]:
        """Return the arrays of which each shard has one file."""
        hooks = [a for h in self.hooks.values() for a in (h.acts, h.scale, h.norm, h.shard_mean)]
        return [
            *(array for array in hooks if array is not None),
            *self.rows.values(),
            *self.examples.values(),
        ]

    def metadata(self) -> dict[str, bytes]:
        """Return every `zarr.json` of the cache by its path."""
        arrays = [*self.per_shard(), *(h.mean for h in self.hooks.values())]
        group = _json({"zarr_format": 3, "node_type": "group", "attributes": {}})
        groups = ["", *(f"{name}/" for name in (*self.hooks, "rows", "examples"))]
        files = {f"{name}zarr.json": group for name in groups}
        return files | {f"{array.path}/zarr.json": array.metadata() for array in arrays}


def layout_of(plan: Plan) -> Layout:
    """Return the arrays of the cache that a plan describes."""
    rows, shards = plan.n_shards * plan.rows_per_shard, plan.n_shards
    hooks = {name: _hook_arrays(plan, name, rows, shards) for name in plan.hook_points}
    return Layout(hooks, _row_arrays(plan, rows), _example_arrays(plan))


def shard_bytes(plan: Plan) -> int:
    """Return how many bytes the files of one shard have together."""
    return sum(array.chunk_bytes for array in layout_of(plan).per_shard())


def _hook_arrays(plan: Plan, name: str, rows: int, shards: int) -> HookArrays:
    d_model, per_row = plan.hook_points[name], ((rows,), (plan.rows_per_shard,))
    acts = ArraySpec(
        f"{name}/acts",
        STORAGE[plan.dtype][1],
        (rows, d_model),
        (plan.rows_per_shard, d_model),
        is_compressed=plan.compression == "zstd",
        attributes={"torch_dtype": plan.dtype, "hook_point": name},
    )
    return HookArrays(
        acts=acts,
        scale=ArraySpec(f"{name}/scale", "float32", *per_row) if has_scale(plan.dtype) else None,
        norm=ArraySpec(f"{name}/norm", "float32", *per_row),
        shard_mean=ArraySpec(f"{name}/shard_mean", "float64", (shards, d_model), (1, d_model)),
        mean=ArraySpec(f"{name}/mean", "float64", (d_model,), (d_model,)),
    )


def _row_arrays(plan: Plan, rows: int) -> dict[str, ArraySpec]:
    return {
        name: ArraySpec(f"rows/{name}", "int32", (rows,), (plan.rows_per_shard,), UNUSED)
        for name in ("example", "position", "token")
    }


def _example_arrays(plan: Plan) -> dict[str, ArraySpec]:
    n, per_shard = plan.n_examples, plan.examples_per_shard
    flat, grid = ((n,), (per_shard,)), ((n, plan.context), (per_shard, plan.context))
    kinds = {"tokens": ("int32", grid), "split": ("int8", flat), "source": ("int32", flat)}
    if plan.label_names:
        kinds["label"] = ("int16", grid)
    if plan.has_segments:
        kinds["segment"] = ("int16", grid)
    attributes = {"source": list(plan.source_names), "label": list(plan.label_names)}
    return {
        name: ArraySpec(
            f"examples/{name}",
            dtype,
            shape,
            chunk,
            UNUSED,
            {"names": attributes[name]} if name in attributes else {},
        )
        for name, (dtype, (shape, chunk)) in kinds.items()
    }


def _json(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=2).encode() + b"\n"


def require_complete(path: Path, manifest: Manifest, records: Mapping[int, ShardRecord]) -> None:
    """Refuse records that leave out a file or a hook point, or whose sizes are not the plan's."""
    layout = layout_of(manifest.plan)
    lost = {arrays.mean.file(0) for arrays in layout.hooks.values()} - manifest.files.keys()
    for shard, record in records.items():
        lost |= {spec.file(shard) for spec in layout.per_shard()} - record.files.keys()
        lost |= layout.hooks.keys() - record.hooks.keys()
        lost |= {
            f"{spec.file(shard)} of {spec.chunk_bytes:,} bytes"
            for spec in layout.per_shard()
            if not spec.is_compressed
            and record.files.get(spec.file(shard), {}).get("bytes", spec.chunk_bytes)
            != spec.chunk_bytes
        }
        if record.valid_rows > manifest.plan.rows_per_shard:
            lost.add(f"room for {record.valid_rows:,} rows in shard {shard}")
    if lost:
        raise CacheFormatError(
            f"{path} must have all that its records name, got no {min(lost)}; build it again"
        )
