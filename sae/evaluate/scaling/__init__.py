"""Scaling laws of dictionaries: which runs to train, and what their losses say of larger ones."""

from typing import TYPE_CHECKING

from monosema.facade import on_first_use

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

__getattr__, __dir__ = on_first_use(__name__, __file__)
