"""Makes `sae_kernels` importable on a machine that has torch and Triton and nothing else."""

import sys
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
    """Find the kernels beside this file, and do without jaxtyping if need be."""
    if find_spec("sae_kernels") is None:
        sys.path.insert(0, str(ROOT / "kernels"))
    if find_spec("jaxtyping") is None:
        sys.modules["jaxtyping"] = stand_in()
