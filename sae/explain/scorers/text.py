"""Scores that need no judge: embeddings, and how surprised a language model is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.explain.intervals import auc
from sae.explain.judges import Judge
from sae.explain.scorers.score import Score, scored
from sae.explain.windows import NEGATIVES, LatentWindows

Embed = Callable[[list[str]], Float[Tensor, "batch d_model"]]
"""Texts to vectors; such as `LocalClient.embed`."""

LogLikelihood = Callable[[str, str], float]
"""Mean log probability of a text's tokens after a prefix; such as `LocalClient.log_likelihood`."""


@dataclass(frozen=True)
class Embedding:
    """AUC of the cosine between label and window, active windows against negatives; floor 0.5."""

    embed: Embed
    """The embedding model."""
    name: str = "embedding"
    """Its name in the results."""

    async def score(
        self,
        latent: LatentWindows,
        explanation: str,
        judge: Judge | None = None,  # noqa: ARG002
    ) -> Score:
        """Embed the label and all score windows."""
        windows = latent.of("score", "active", *NEGATIVES)
        vectors = self.embed([explanation, *(window.text for window in windows)]).float()
        vectors = torch.nn.functional.normalize(vectors, dim=1)
        figures = (vectors[1:] @ vectors[0]).tolist()
        return by_source(self.name, [w.source for w in windows], figures)


@dataclass(frozen=True)
class Surprisal:
    """AUC of how much the label lowers the loss of a window; floor 0.5.

    figure(window) = log p(window | label) - log p(window | a text that says nothing), per token.
    """

    log_likelihood: LogLikelihood
    """The language model."""
    name: str = "surprisal"
    """Its name in the results."""

    async def score(
        self,
        latent: LatentWindows,
        explanation: str,
        judge: Judge | None = None,  # noqa: ARG002
    ) -> Score:
        """Two likelihoods of every score window."""
        windows = latent.of("score", "active", *NEGATIVES)
        with_label, without = f"This text is about {explanation}:", "This is a text:"
        figures = [
            self.log_likelihood(with_label, w.text) - self.log_likelihood(without, w.text)
            for w in windows
        ]
        return by_source(self.name, [w.source for w in windows], figures)


def by_source(name: str, sources: Sequence[str], figures: Sequence[float]) -> Score:
    """AUC of figures of active windows against the negatives of all sources, and of each."""
    values, source = np.array(figures, np.float64), np.array(sources)
    known = np.isfinite(values)
    base = Score(name, 0.5, len(values), int((~known).sum()))
    positive = values[known & (source == "active")]
    found = {
        one: auc(positive, values[known & (source == one)]).value
        for one in dict.fromkeys(source.tolist())
        if one != "active" and len(positive) and (known & (source == one)).any()
    }
    if not found:
        return Score(name, 0.5, base.n, base.n_failed, reason="no active windows or no negatives")
    interval = auc(positive, values[known & (source != "active")])
    extreme = [np.where(known, values, np.where((source == "active") == up, np.inf, -np.inf))
               for up in (False, True)]  # fmt: skip
    worst, best = (auc(v[source == "active"], v[source != "active"]).value for v in extreme)
    return scored(base, interval, (worst, best), per_source=found)
