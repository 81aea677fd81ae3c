"""What the model that is explained gives to scorers: likelihoods, embeddings, interventions."""

from collections.abc import Sequence

import torch

from activations_cache import ActivationCache, capture
from activations_cache.models import LoadedModel
from activations_cache.text import NO_TOKEN
from sae.autoencoder import SparseAutoencoder
from sae.cli.unembedding import unembedding
from sae.explain.config import ExplainConfig
from sae.explain.llm.local_client import LocalClient
from sae.explain.logit_lens import promoted_tokens
from sae.explain.scorers.by_model import amplified
from sae.explain.scorers.choice import WITH_TOOLS, Tools

N_PROMPTS, PROMPT_TOKENS, N_PROMOTED = 8, 16, 10


def tools_for(
    config: ExplainConfig,
    dictionary: SparseAutoencoder,
    cache: ActivationCache,
    hook_point: str,
    loaded: LoadedModel,
) -> Tools | None:
    """The tools, or None if no scorer that is asked for needs them."""
    parts = (config.rules, config.autointerp)
    wanted = {name for part in parts if part is not None for name in part.scorers}
    if not wanted & set(WITH_TOOLS):
        return None
    client = LocalClient(loaded, "the model that is explained")
    skipped = cache.manifest.plan.skip_positions

    @torch.no_grad()
    def peaks_on(latent: int, texts: Sequence[str]) -> list[float]:
        found = []
        for text in texts:
            ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
            with capture(loaded.model, [hook_point]) as run:
                rows = run(ids)[hook_point][0, skipped:].float()
            acts = dictionary.encode_dense(rows)[:, latent]
            found.append(float(acts.max()) if len(acts) else 0.0)
        return found

    examples = cache.examples
    neutral = examples.tokens[examples.split == 2][:, :PROMPT_TOKENS]
    neutral = neutral[(neutral != NO_TOKEN).all(dim=1)][:N_PROMPTS]
    if not len(neutral):
        raise ValueError(f"{cache.path} must have held-out examples for prompts, got none")
    lens = promoted_tokens(dictionary, *unembedding(loaded.model), N_PROMOTED)
    return Tools(
        client.embed, client.log_likelihood,
        amplified(loaded.model, neutral.long(), dictionary, hook_point), lens.promoted, peaks_on,
    )  # fmt: skip
