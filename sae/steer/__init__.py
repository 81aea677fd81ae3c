"""Puts a dictionary back into its model: steering, attribution, search."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae.steer.candidates import Candidate, target_tokens
    from sae.steer.choice import Choice, Subject, choose_latent
    from sae.steer.config import SteerConfig
    from sae.steer.edits import Edit, Patch, Push, Splice
    from sae.steer.effects import Effect, measure_effect
    from sae.steer.generation import generate
    from sae.steer.place import Placed, load
    from sae.steer.positions import Patches
    from sae.steer.steering import Count, Steering
    from sae.steer.vectors import mean_difference, random_direction, stream_of

__all__ = [
    "Candidate",
    "Choice",
    "Count",
    "Edit",
    "Effect",
    "Patch",
    "Patches",
    "Placed",
    "Push",
    "Splice",
    "SteerConfig",
    "Steering",
    "Subject",
    "choose_latent",
    "generate",
    "load",
    "mean_difference",
    "measure_effect",
    "random_direction",
    "stream_of",
    "target_tokens",
]

_HOME = {
    "Candidate": "sae.steer.candidates",
    "Choice": "sae.steer.choice",
    "Count": "sae.steer.steering",
    "Edit": "sae.steer.edits",
    "Effect": "sae.steer.effects",
    "Patch": "sae.steer.edits",
    "Patches": "sae.steer.positions",
    "Placed": "sae.steer.place",
    "Push": "sae.steer.edits",
    "Splice": "sae.steer.edits",
    "SteerConfig": "sae.steer.config",
    "Steering": "sae.steer.steering",
    "Subject": "sae.steer.choice",
    "choose_latent": "sae.steer.choice",
    "generate": "sae.steer.generation",
    "load": "sae.steer.place",
    "mean_difference": "sae.steer.vectors",
    "measure_effect": "sae.steer.effects",
    "random_direction": "sae.steer.vectors",
    "stream_of": "sae.steer.vectors",
    "target_tokens": "sae.steer.candidates",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sae.steer' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
