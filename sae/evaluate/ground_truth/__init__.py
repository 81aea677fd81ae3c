"""Worlds whose features are known, and how well a dictionary finds them; no model, no cache."""

from typing import TYPE_CHECKING

from monosema.facade import on_first_use

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

__getattr__, __dir__ = on_first_use(__name__, __file__)
