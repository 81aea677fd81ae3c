"""Labels for every latent without a language model: statistics, executable rules, honest scores."""

from typing import TYPE_CHECKING

from monosema.facade import on_first_use

if TYPE_CHECKING:
    from sae.explain.config import ExplainConfig
    from sae.explain.logit_lens import promoted_tokens
    from sae.explain.run import explain
    from sae.explain.tables import read_examples, read_latents

__all__ = ["ExplainConfig", "explain", "promoted_tokens", "read_examples", "read_latents"]

__getattr__, __dir__ = on_first_use(__name__, __file__)
