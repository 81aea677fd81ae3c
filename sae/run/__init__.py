"""Whole jobs as functions: what the command does, with return values and without printing.

Nothing heavy is imported until a job is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae.run.browsing import browse
    from sae.run.caches import cache, hook_points, model, verify
    from sae.run.comparing import compare
    from sae.run.concept_sets import bottleneck, concepts
    from sae.run.costs import training_cost
    from sae.run.explaining import explain
    from sae.run.finding import find
    from sae.run.measuring import evaluate
    from sae.run.page import show
    from sae.run.pipeline import job, train
    from sae.run.refining import distil, refine
    from sae.run.releases import convert, inspect, push, verify_release
    from sae.run.spaces import similar
    from sae.run.steering import steer
    from sae.run.steering_by_words import steer_pictures, steer_words
    from sae.run.widths import study

__all__ = [
    "bottleneck",
    "browse",
    "cache",
    "compare",
    "concepts",
    "convert",
    "distil",
    "evaluate",
    "explain",
    "find",
    "hook_points",
    "inspect",
    "job",
    "model",
    "push",
    "refine",
    "show",
    "similar",
    "steer",
    "steer_pictures",
    "steer_words",
    "study",
    "train",
    "training_cost",
    "verify",
    "verify_release",
]

_HOME = {
    "bottleneck": "concept_sets",
    "browse": "browsing",
    "cache": "caches",
    "compare": "comparing",
    "concepts": "concept_sets",
    "convert": "releases",
    "distil": "refining",
    "evaluate": "measuring",
    "explain": "explaining",
    "find": "finding",
    "hook_points": "caches",
    "inspect": "releases",
    "job": "pipeline",
    "model": "caches",
    "push": "releases",
    "refine": "refining",
    "show": "page",
    "similar": "spaces",
    "steer": "steering",
    "steer_pictures": "steering_by_words",
    "steer_words": "steering_by_words",
    "study": "widths",
    "train": "pipeline",
    "training_cost": "costs",
    "verify": "caches",
    "verify_release": "releases",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sae.run' has no attribute {name!r}")
    return getattr(import_module(f"sae.run.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
