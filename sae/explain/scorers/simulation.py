"""Simulation: does the label predict the activation of every token? (Bills et al. 2023)."""

import asyncio
from dataclasses import dataclass

from sae.explain.intervals import correlation
from sae.explain.judges import Judge
from sae.explain.llm.corpus_text import item
from sae.explain.scorers.score import Score, ask, scored
from sae.explain.windows import LatentWindows, seed_of


@dataclass(frozen=True)
class Simulation:
    """Correlation of predicted and real activations over the tokens of all windows together.

    Pearson's, with Spearman's in the details; floor 0. Where either side is constant it is
    undefined, and said to be so. A failed window is left out of the value; `worst` and `best` count
    its share as -1 and 1.
    """

    n_random: int = 10
    """Random negatives that stand beside the active windows."""
    name: str = "simulation"
    """Its name in the results."""

    async def score(self, latent: LatentWindows, explanation: str, judge: Judge) -> Score:
        """Ask about one window at a time."""
        windows = latent.of("score", "active") + latent.of("score", "random")[: self.n_random]
        asked = [
            ask(judge, "simulation", explanation, [item([token or " "]) for token in w.tokens])
            for w in windows
        ]
        found = await asyncio.gather(*asked)
        predicted = [levels for levels in found if levels is not None]
        real = [
            w.activations for w, levels in zip(windows, found, strict=True) if levels is not None
        ]
        count = len(windows), len(windows) - len(predicted)
        seed = seed_of("simulation", latent.latent)
        interval = correlation(predicted, real, seed=seed) if predicted else None
        if interval is None:
            flat = "undefined: the predictions or the activations are constant"
            return Score(
                self.name, 0.0, *count, reason=flat if predicted else "no answered windows"
            )
        missing = count[1] / count[0]
        kept = interval.value * (1 - missing)
        ranked = correlation(predicted, real, ranks=True, seed=seed)
        details = {} if ranked is None else {"spearman": ranked.value}
        bounds = kept - missing, kept + missing
        return scored(Score(self.name, 0.0, *count), interval, bounds, details=details)
