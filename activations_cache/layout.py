"""Which arrays a cache has, and where: a Zarr v3 group with one uncompressed file per shard.

FORMAT.md states the same in tables; tests hold the two together.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from activations_cache.manifest import Plan
from activations_cache.storage import STORAGE, ZSTD_LEVEL, has_scale

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
