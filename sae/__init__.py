"""Sparse dictionaries of a model's activations: load, save, encode, decode.

`import sae` imports nothing heavy; torch comes with the first name that is used.
"""

from typing import TYPE_CHECKING

from monosema.facade import on_first_use

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

__getattr__, __dir__ = on_first_use(__name__, __file__)
