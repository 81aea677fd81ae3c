"""The text of a cache is packed once, however many processes build the cache.

The first process packs it and writes it beside the locks of the cache; the others wait and read it.
It stays until the cache is complete, so that a build that goes on need not read the corpus again.

Whether the tasks of a SLURM job can find each other.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from activations_cache import io
from activations_cache.text import PackedText
from activations_cache.writer import LOCKS
from monosema.checks import MonosemaError

_FILE, _RECORD = "text.safetensors", "text.json"
_TENSORS = ("tokens", "split", "source", "documents", "segments", "labels")


def packed_once(
    cache: Path, made_from: Mapping[str, Any], pack: Callable[[], PackedText]
) -> PackedText:
    """Return the text that a process of this cache packed, or pack it for all.

    Args:
        cache: Directory of the cache.
        made_from: What decides the text, as JSON takes it; another text is packed anew.
        pack: Packs it.

    Raises:
        DiskFullError: If it does not fit beside the cache.
    """
    directory = cache / LOCKS
    io.make_directory(directory)
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    with io.lock(directory / "text.lock", f"the text of {cache}", wait_s=math.inf):
        result = _read(directory, digest)
        if result is None:
            _write(directory, digest, pack())
            result = _read(directory, digest)
            assert result is not None, "what was just written is read"
    return result


def forget(cache: Path) -> None:
    """Remove the text of a cache that is complete."""
    for name in (_RECORD, _FILE):
        (cache / LOCKS / name).unlink(missing_ok=True)


def _write(directory: Path, digest: str, packed: PackedText) -> None:
    entries = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
    tensors = {name: entries.pop(name) for name in _TENSORS}
    data = save({n: tensor.contiguous() for n, tensor in tensors.items() if tensor is not None})
    record = {"made_from": digest, "file": io.describe(data), "entries": entries}
    io.write_files({directory / _FILE: data, directory / _RECORD: json.dumps(record).encode()})


def _read(directory: Path, digest: str) -> PackedText | None:
    """Return what was packed; None where nothing is there, or another text, or a damaged one."""
    try:
        record = json.loads((directory / _RECORD).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    file = directory / _FILE
    if record["made_from"] != digest or io.problem(file, record["file"]) is not None:
        return None
    entries: dict[str, Any] = dict.fromkeys(_TENSORS) | load(file.read_bytes())
    for name, entry in record["entries"].items():
        entries[name] = tuple(entry) if isinstance(entry, list) else entry
    return PackedText(**entries)


def require_launched() -> None:
    """Refuse tasks of SLURM that would not find each other, before anything is waited for.

    Raises:
        MonosemaError: If there are several, and they were not started by srun, or not per node.
    """
    n_tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if n_tasks == 1 or "WORLD_SIZE" in os.environ:  # torchrun says who is who
        return
    is_step = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    is_shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if is_shell and not is_step:
        return
    if not is_step:
        raise MonosemaError(
            f"the {n_tasks} tasks of a SLURM job must be started by srun, got one process beside "
            "it; write srun before the command, or ask for one task"
        )
    if is_shell:
        raise MonosemaError(
            f"{n_tasks} tasks of SLURM must have a job name that is no shell's, got "
            f"{os.environ['SLURM_JOB_NAME']!r}; srun --job-name=train"
        )
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise MonosemaError(
            f"tasks of SLURM must be asked for per node, got --ntasks={n_tasks}; use "
            "--nodes=N --ntasks-per-node=M, one task for each GPU of a node"
        )
