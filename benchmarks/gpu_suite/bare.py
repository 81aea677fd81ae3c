"""Makes the project importable on a machine that has torch and Triton and nothing else.

On a machine without a GPU it lets a CPU take a GPU's paths, with the kernels in the interpreter.
"""

import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class _AnyShape:
    """Stands for `Float` and the like: the shape in the brackets is left out."""

    def __class_getitem__(cls, item: Any) -> Any:
        return item[0]


def stand_in() -> ModuleType:
    """What takes the place of jaxtyping where it is not installed: annotations without shapes."""
    module = ModuleType("jaxtyping")
    module.__getattr__ = _annotation
    return module


def _annotation(name: str) -> type[_AnyShape]:
    if name.startswith("_"):
        raise AttributeError(name)
    return _AnyShape


def prepare() -> None:
    """Take the kernels beside this file, and do without jaxtyping if need be."""
    sys.path.insert(0, str(ROOT / "kernels"))
    if find_spec("jaxtyping") is None:
        sys.modules["jaxtyping"] = stand_in()


_forced: list[str] = []
"""The backend that takes CPU tensors in this process, if one is forced."""


def interpret() -> None:
    """From now on let every op take its kernels for CPU tensors; Triton has to interpret them."""
    import sae_kernels

    _forced.append("triton")
    for part in pkgutil.iter_modules(sae_kernels.__path__):
        module = import_module(f"sae_kernels.{part.name}")
        choose = getattr(module, "choose", None)
        if choose is not None:
            vars(module)["choose"] = _choosing(choose)


def _choosing(choose: Any) -> Any:
    def chosen(tensor: Any, backend: str | None) -> str:
        fits = _forced and tensor.dtype.itemsize < 8
        return choose(tensor, backend or (_forced[-1] if fits else None))

    return chosen


@contextmanager
def on_cpu() -> Iterator[None]:
    """Let CPU tensors take a CPU's paths inside."""
    before = _forced[:]
    _forced.clear()
    try:
        yield
    finally:
        _forced.extend(before)
