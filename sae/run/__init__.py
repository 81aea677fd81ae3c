"""Whole jobs as functions: what the command does, with return values and without printing.

Nothing heavy is imported until a job is used.
"""

from typing import TYPE_CHECKING

from monosema.facade import on_first_use

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

__getattr__, __dir__ = on_first_use(__name__, __file__)
