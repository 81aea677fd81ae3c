"""Puts a dictionary back into its model and turns single latents up, down or off."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae.steer.candidates import Candidate, target_tokens
    from sae.steer.choice import Choice, Subject, choose_latent
    from sae.steer.config import Ablate, Add, Clamp, Operation, Scale, SteerConfig
    from sae.steer.effects import Effect, measure_effect
    from sae.steer.generation import generate
    from sae.steer.steering import steering

__all__ = [
    "Ablate",
    "Add",
    "Candidate",
    "Choice",
    "Clamp",
    "Effect",
    "Operation",
    "Scale",
    "SteerConfig",
    "Subject",
    "choose_latent",
    "generate",
    "measure_effect",
    "steering",
    "target_tokens",
]

_HOME = {
    "Ablate": "sae.steer.config",
    "Add": "sae.steer.config",
    "Candidate": "sae.steer.candidates",
    "Choice": "sae.steer.choice",
    "Clamp": "sae.steer.config",
    "Effect": "sae.steer.effects",
    "Operation": "sae.steer.config",
    "Scale": "sae.steer.config",
    "SteerConfig": "sae.steer.config",
    "Subject": "sae.steer.choice",
    "choose_latent": "sae.steer.choice",
    "generate": "sae.steer.generation",
    "measure_effect": "sae.steer.effects",
    "steering": "sae.steer.steering",
    "target_tokens": "sae.steer.candidates",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sae.steer' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
