"""Sparse dictionaries of a model's activations: load, save, encode, decode.

`import sae` imports nothing heavy; torch comes with the first name that is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from activations_cache import capture
    from sae import evaluate, explain, pretrained, run, steer, train
    from sae.architecture import SAEConfig
    from sae.autoencoder import Latents, SparseAutoencoder
    from sae.pretrained import load, save

__all__ = [
    "Latents",
    "SAEConfig",
    "SparseAutoencoder",
    "capture",
    "evaluate",
    "explain",
    "load",
    "pretrained",
    "run",
    "save",
    "steer",
    "train",
]

_HOME = {
    "Latents": "sae.autoencoder",
    "SAEConfig": "sae.architecture",
    "SparseAutoencoder": "sae.autoencoder",
    "capture": "activations_cache",
    "load": "sae.pretrained",
    "save": "sae.pretrained",
}


_PACKAGES = ("evaluate", "explain", "pretrained", "run", "steer", "train")


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return import_module(f"sae.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'sae' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
