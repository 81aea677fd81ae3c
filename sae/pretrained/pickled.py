"""Pickled weights (.pt), read by a process of their own that can do nothing but read them."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

from sae.pretrained import pickled_child
from sae.pretrained.fields import DictionaryFormatError, one_line

SECONDS = 120
SECONDS_PER_GIB = 60


class Content(NamedTuple):
    """What a .pt file holds; names of nested dicts are joined by dots."""

    tensors: dict[str, Tensor]
    """Tensors as stored."""
    values: dict[str, object]
    """Numbers, texts and None; of anything else the name of its type, in angle brackets."""


def read(path: Path, start: int = 0) -> Content:
    """Read a .pt file, or what follows its first `start` bytes, in a confined process.

    The kernel refuses the process all but reading the file and writing its answer, a safetensors
    file; its environment is empty; memory, time and the answer's size are bounded.

    Raises:
        DictionaryFormatError: If the file holds more than tensors and plain values, or is damaged.
    """
    size = path.stat().st_size
    with tempfile.TemporaryDirectory(prefix="monosema-") as folder:
        target = Path(folder) / "weights.safetensors"
        error = convert(path, target, SECONDS + SECONDS_PER_GIB * size / 2**30, start)
        if error:
            raise DictionaryFormatError(
                f"{path} must hold tensors and plain values alone, got: {error}"
            )
        with safe_open(target, framework="pt") as opened:
            values = pickled_child.unpacked(opened.metadata())
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    return Content(tensors, values)


def convert(path: Path, target: Path, seconds: float, start: int = 0) -> str | None:
    """Run the confined process; return what went wrong in one line, or None."""
    command = [sys.executable, "-P", pickled_child.__file__, str(path), str(target), str(start)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds,
            check=False, cwd=target.parent, env={},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no end within {seconds:.0f} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return one_line(ValueError(lines[-1] if lines else f"exit code {done.returncode}"))
