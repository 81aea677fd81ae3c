"""Scaling laws of dictionaries: which runs to train, and what their losses say of larger ones."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae.evaluate.config import PlannedRun, ScalingConfig, plan
    from sae.evaluate.scaling.fit import FittedLaw, Laws, Optimum, draw, fit_laws
    from sae.evaluate.scaling.runs import FinishedRun, Fitted, RateLaw, read_runs

__all__ = [
    "FinishedRun",
    "Fitted",
    "FittedLaw",
    "Laws",
    "Optimum",
    "PlannedRun",
    "RateLaw",
    "ScalingConfig",
    "draw",
    "fit_laws",
    "plan",
    "read_runs",
]

_HOME = {
    "Fitted": "scaling.runs",
    "FittedLaw": "scaling.fit",
    "Laws": "scaling.fit",
    "Optimum": "scaling.fit",
    "PlannedRun": "config",
    "RateLaw": "scaling.runs",
    "FinishedRun": "scaling.runs",
    "ScalingConfig": "config",
    "draw": "scaling.fit",
    "fit_laws": "scaling.fit",
    "plan": "config",
    "read_runs": "scaling.runs",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sae.evaluate.scaling' has no attribute {name!r}")
    return getattr(import_module(f"sae.evaluate.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
