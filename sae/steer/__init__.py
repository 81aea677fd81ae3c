"""Puts a dictionary back into its model: steering, attribution, search."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae.steer.attribution import (
        ablation_effects,
        agreement,
        attribute,
        direct_logits,
        logit_difference,
        mean_difference,
        random_direction,
        stream_of,
    )
    from sae.steer.choice import Candidate, Choice, SteerSubject, choose_latent, target_tokens
    from sae.steer.config import SteerConfig, SweepConfig
    from sae.steer.edits import Calibrate, Edit, Patch, Push, Splice
    from sae.steer.generation import Effect, Patches, generate, measure_effect
    from sae.steer.paths import MetricOfLatents, integrated_gradients
    from sae.steer.search import find_latents, nearest_latents
    from sae.steer.steering import Count, Steering
    from sae.steer.sweep import Target

__all__ = [
    "Calibrate",
    "Candidate",
    "Choice",
    "Count",
    "Edit",
    "Effect",
    "MetricOfLatents",
    "Patch",
    "Patches",
    "Push",
    "Splice",
    "SteerConfig",
    "SteerSubject",
    "Steering",
    "SweepConfig",
    "Target",
    "ablation_effects",
    "agreement",
    "attribute",
    "choose_latent",
    "direct_logits",
    "find_latents",
    "generate",
    "integrated_gradients",
    "logit_difference",
    "mean_difference",
    "measure_effect",
    "nearest_latents",
    "random_direction",
    "stream_of",
    "target_tokens",
]

_HOME = {
    "Calibrate": "sae.steer.edits",
    "Candidate": "sae.steer.choice",
    "Choice": "sae.steer.choice",
    "Count": "sae.steer.steering",
    "Edit": "sae.steer.edits",
    "Effect": "sae.steer.generation",
    "MetricOfLatents": "sae.steer.paths",
    "Patch": "sae.steer.edits",
    "Patches": "sae.steer.generation",
    "Push": "sae.steer.edits",
    "Splice": "sae.steer.edits",
    "SteerConfig": "sae.steer.config",
    "Steering": "sae.steer.steering",
    "SteerSubject": "sae.steer.choice",
    "SweepConfig": "sae.steer.config",
    "Target": "sae.steer.sweep",
    "ablation_effects": "sae.steer.attribution",
    "agreement": "sae.steer.attribution",
    "attribute": "sae.steer.attribution",
    "choose_latent": "sae.steer.choice",
    "direct_logits": "sae.steer.attribution",
    "find_latents": "sae.steer.search",
    "generate": "sae.steer.generation",
    "integrated_gradients": "sae.steer.paths",
    "logit_difference": "sae.steer.attribution",
    "mean_difference": "sae.steer.attribution",
    "measure_effect": "sae.steer.generation",
    "nearest_latents": "sae.steer.search",
    "random_direction": "sae.steer.attribution",
    "stream_of": "sae.steer.attribution",
    "target_tokens": "sae.steer.choice",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sae.steer' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
