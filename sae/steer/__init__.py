"""Puts a dictionary back into its model: steering, attribution, search."""

from typing import TYPE_CHECKING

from monosema.facade import on_first_use

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

__getattr__, __dir__ = on_first_use(__name__, __file__)
