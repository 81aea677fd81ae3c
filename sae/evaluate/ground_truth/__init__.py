"""Worlds whose features are known, and how well a dictionary finds them; no model, no cache."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae.evaluate.ground_truth.config import TIERS, GroundTruthConfig
    from sae.evaluate.ground_truth.run import GroundTruthReport, evaluate, table_rows, table_text
    from sae.evaluate.ground_truth.scores import Ceilings, measure_ceilings, set_true_decoder
    from sae.evaluate.ground_truth.world import TrueBatch, World, batches, make_world

__all__ = [
    "TIERS",
    "Ceilings",
    "GroundTruthConfig",
    "GroundTruthReport",
    "TrueBatch",
    "World",
    "batches",
    "evaluate",
    "make_world",
    "measure_ceilings",
    "set_true_decoder",
    "table_rows",
    "table_text",
]

_HOME = {
    "TIERS": "config",
    "Ceilings": "scores",
    "GroundTruthConfig": "config",
    "GroundTruthReport": "run",
    "TrueBatch": "world",
    "World": "world",
    "batches": "world",
    "evaluate": "run",
    "make_world": "world",
    "measure_ceilings": "scores",
    "set_true_decoder": "scores",
    "table_rows": "run",
    "table_text": "run",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sae.evaluate.ground_truth' has no attribute {name!r}")
    return getattr(import_module(f"sae.evaluate.ground_truth.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
