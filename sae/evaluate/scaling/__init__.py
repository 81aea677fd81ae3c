"""Scaling laws of dictionaries: which runs to train, and what their losses say of larger ones."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae.evaluate.scaling.config import PlannedRun, ScalingConfig, plan
    from sae.evaluate.scaling.fit import FittedLaw, Laws, Optimum, fit_laws
    from sae.evaluate.scaling.plot import draw
    from sae.evaluate.scaling.runs import Fitted, RateLaw, Run, read_runs

__all__ = [
    "Fitted",
    "FittedLaw",
    "Laws",
    "Optimum",
    "PlannedRun",
    "RateLaw",
    "Run",
    "ScalingConfig",
    "draw",
    "fit_laws",
    "plan",
    "read_runs",
]

_HOME = {
    "Fitted": "runs",
    "FittedLaw": "fit",
    "Laws": "fit",
    "Optimum": "fit",
    "PlannedRun": "config",
    "RateLaw": "runs",
    "Run": "runs",
    "ScalingConfig": "config",
    "draw": "plot",
    "fit_laws": "fit",
    "plan": "config",
    "read_runs": "runs",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sae.evaluate.scaling' has no attribute {name!r}")
    return getattr(import_module(f"sae.evaluate.scaling.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
