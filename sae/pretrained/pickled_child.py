"""Run as a script: read IN.pt with weights_only, write its tensors to OUT.safetensors.

The one place where `torch.load` is used. Before it, the process gives up what an attack would
need: it can open no file, no socket and start no program, and its memory, time and output are
bounded. It imports nothing of this project.
"""

import io
import json
import os
import resource
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import IO

import safetensors.torch
import torch

MAX_DEPTH = 4
GIB = 1 << 30


def main(source_path: str, target_path: str, start: str) -> None:
    """Convert one file, or what follows its first `start` bytes.

    Raises:
        ValueError: If it holds something else than tensors and plain values.
    """
    with open(source_path, "rb") as source, open(target_path, "wb") as target:
        size = os.fstat(source.fileno()).st_size
        _warm_up()
        _confine(size)
        source.seek(int(start))
        target.write(convert(io.BytesIO(source.read()) if int(start) else source, size))


def convert(source: IO[bytes] | io.BytesIO, size: int) -> bytes:
    """Return the safetensors file of what a .pt file of `size` bytes holds."""
    content = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise ValueError(f"a {type(content).__name__} instead of a dict of tensors")
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, object] = {}
    _flatten(content, "", tensors, values)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > 2 * size:  # a tied matrix has two names; strides of 0 make any size from nothing
        raise ValueError(f"tensors of {total:,} bytes in a file of {size:,}")
    return safetensors.torch.save(
        {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()},
        {"values": json.dumps(values)},
    )


def unpacked(metadata: Mapping[str, str]) -> dict[str, object]:
    """Return the values that `convert` put beside the tensors."""
    return json.loads(metadata["values"])


def _flatten(content: Mapping, prefix: str, tensors: dict, values: dict) -> None:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.is_quantized:
                raise ValueError(f"{name!r} is not a plain tensor")
            tensors[name] = value
        elif isinstance(value, Mapping) and prefix.count(".") < MAX_DEPTH:
            _flatten(value, f"{name}.", tensors, values)
        elif value is None or isinstance(value, bool | int | float | str):
            values[name] = value
        else:
            values[name] = f"<{type(value).__name__}>"


def _warm_up() -> None:
    """Import all that reading and writing needs, while files can still be opened."""
    torch.set_num_threads(1)
    sample = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, sample)
    size = sample.tell()
    sample.seek(0)
    convert(sample, size)


def _confine(size: int) -> None:
    limits = {
        resource.RLIMIT_DATA: 4 * GIB + 4 * size,
        resource.RLIMIT_CPU: 120 + 60 * size // GIB,
        resource.RLIMIT_FSIZE: 2 * size + (1 << 20),
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 0,
    }
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _one_line(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
    sys.stderr.write(" ".join(f"{kind.__name__}: {error}".split())[:300] + "\n")


if __name__ == "__main__":
    sys.excepthook = _one_line
    main(*sys.argv[1:])
