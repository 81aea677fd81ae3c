"""Labels for every latent without a language model: statistics, executable rules, honest scores."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae.explain.config import ExplainConfig
    from sae.explain.logit_lens import promoted_tokens
    from sae.explain.run import explain
    from sae.explain.tables import read_examples, read_latents

__all__ = ["ExplainConfig", "explain", "promoted_tokens", "read_examples", "read_latents"]

_HOME = {
    "ExplainConfig": "sae.explain.config",
    "explain": "sae.explain.run",
    "promoted_tokens": "sae.explain.logit_lens",
    "read_examples": "sae.explain.tables",
    "read_latents": "sae.explain.tables",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sae.explain' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
