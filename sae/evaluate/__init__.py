"""How good a dictionary is: reconstruction, and the model with the dictionary spliced in."""

from typing import TYPE_CHECKING

from monosema.facade import on_first_use

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

__getattr__, __dir__ = on_first_use(__name__, __file__)
