"""Rubric: how specific is the latent at each level of activation? (Templeton et al. 2024)."""

from dataclasses import dataclass

import numpy as np

from sae.explain.intervals import Interval, ranked, wilson
from sae.explain.judges import Judge
from sae.explain.llm.corpus_text import item
from sae.explain.scorers.score import Score, ask_in_batches, scored
from sae.explain.windows import LatentWindows, shuffled

_HIGHEST = 3


@dataclass(frozen=True)
class Rubric:
    """Grades 0 to 3 of the active windows, by step of activation.

    value = mean grade / 3 over the active windows as they were sampled; `details` has the mean
    grade of each step ("level 0" weakest), the share of each grade in it ("level 0 grade 3"), the
    mean re-weighted to the natural distribution, and Spearman's correlation of step and grade. The
    floor of 0 is the lowest grade; what chance gives is the control with another's explanation.
    """

    batch: int = 5
    """Windows per question."""
    name: str = "rubric"
    """Its name in the results."""

    async def score(self, latent: LatentWindows, explanation: str, judge: Judge) -> Score:
        """Ask for grades in mixed order."""
        windows = shuffled(latent.of("score", "active"), "rubric", latent.latent)
        items = [item(window.tokens, window.marks()) for window in windows]
        answers = await ask_in_batches(judge, "rubric", explanation, items, self.batch)
        known = [(w, round(a)) for w, a in zip(windows, answers, strict=True) if a is not None]
        count = len(windows), len(windows) - len(known)
        if not known:
            return Score(self.name, 0.0, *count, reason="no answered windows")
        grades = np.array([grade for _, grade in known], np.float64)
        levels = np.array([window.bucket for window, _ in known], np.float64)
        natural = np.array([1 / window.inclusion for window, _ in known])
        details = {"natural": float((grades * natural).sum() / natural.sum() / _HIGHEST)}
        details |= curve(levels, grades)
        total = grades.sum() / _HIGHEST
        bounds = total / count[0], (total + count[1]) / count[0]
        interval = _mean(grades / _HIGHEST)
        return scored(Score(self.name, 0.0, *count), interval, bounds, details=details)


def curve(levels: np.ndarray, grades: np.ndarray) -> dict[str, float]:
    """Mean and shares of the grades at each level, and how they go together."""
    found: dict[str, float] = {}
    for level in np.unique(levels):
        here = grades[levels == level]
        found[f"level {level:.0f}"] = float(here.mean())
        for grade in range(_HIGHEST + 1):
            found[f"level {level:.0f} grade {grade}"] = float((here == grade).mean())
    if len(np.unique(levels)) > 1 and len(np.unique(grades)) > 1:
        found["spearman"] = float(np.corrcoef(ranked(levels), ranked(grades))[0, 1])
    return found


def _mean(values: np.ndarray) -> Interval:
    """Mean of values from 0 to 1: Wilson's interval with the trials that their spread is worth."""
    n, mean = len(values), float(values.mean())
    spread = float(values.var(ddof=1)) if n > 1 else 0.0
    worth = min(max(mean * (1 - mean) * n / spread, 1.0), 9.0 * n) if spread > 0 else float(n)
    return wilson(mean * worth, worth)
