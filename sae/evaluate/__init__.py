"""How good a dictionary is: reconstruction, and the model with the dictionary spliced in."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae.evaluate.config import EvaluateConfig
    from sae.evaluate.reconstruction import firing_statistics, measure_reconstruction
    from sae.evaluate.report import Evaluation, EvaluationReport, evaluate, read_json, write_json
    from sae.evaluate.substitution import measure_substitution

__all__ = [
    "EvaluateConfig",
    "Evaluation",
    "EvaluationReport",
    "evaluate",
    "firing_statistics",
    "measure_reconstruction",
    "measure_substitution",
    "read_json",
    "write_json",
]

_HOME = {
    "EvaluateConfig": "sae.evaluate.config",
    "Evaluation": "sae.evaluate.report",
    "EvaluationReport": "sae.evaluate.report",
    "evaluate": "sae.evaluate.report",
    "firing_statistics": "sae.evaluate.reconstruction",
    "measure_reconstruction": "sae.evaluate.reconstruction",
    "measure_substitution": "sae.evaluate.substitution",
    "read_json": "sae.evaluate.report",
    "write_json": "sae.evaluate.report",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sae.evaluate' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
