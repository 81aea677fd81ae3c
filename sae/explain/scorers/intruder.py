"""Intruder: can the window that is not the latent's be told, without any explanation?"""

import asyncio
from dataclasses import dataclass

from sae.explain.intervals import wilson
from sae.explain.judges import Judge
from sae.explain.llm.corpus_text import Item, item
from sae.explain.scorers.detection import random_marks
from sae.explain.scorers.score import Score, ask, scored
from sae.explain.windows import LatentWindows, seed_of, shuffled


@dataclass(frozen=True)
class Intruder:
    """Share of sets of which the odd one is named; floor 1 / size.

    It needs no explanation, so it comes first where money is short: a latent whose windows have
    nothing in common is not worth a label.
    """

    size: int = 5
    """Windows per set, one of them a random negative with as many random marks."""
    name: str = "intruder"
    """Its name in the results."""

    async def score(
        self,
        latent: LatentWindows,
        explanation: str,  # noqa: ARG002
        judge: Judge,
    ) -> Score:
        """Ask about sets that share no window; the explanation is not shown."""
        sets = self.sets(latent)
        if not sets:
            return Score(self.name, 1 / self.size, 0, 0, reason="too few windows for a set")
        found = await asyncio.gather(*(ask(judge, "intruder", "", items) for items, _ in sets))
        right = [
            None if answer is None else answer == [place]
            for answer, (_, place) in zip(found, sets, strict=True)
        ]
        known = [r for r in right if r is not None]
        count = len(sets), len(sets) - len(known)
        if not known:
            return Score(self.name, 1 / self.size, *count, reason="no answered sets")
        bounds = sum(known) / count[0], (sum(known) + count[1]) / count[0]
        base = Score(self.name, 1 / self.size, *count)
        return scored(base, wilson(sum(known), len(known)), bounds)

    def sets(self, latent: LatentWindows) -> list[tuple[list[Item], int]]:
        """Items of each set, and the number of the intruder, from 1."""
        active = shuffled(latent.of("score", "active"), "intruder", latent.latent)
        others = latent.of("score", "random")
        n_sets = min(len(active) // (self.size - 1), len(others))
        made = []
        for index in range(n_sets):
            own = active[index * (self.size - 1) : (index + 1) * (self.size - 1)]
            other = others[index]
            n_marks = sum(own[0].marks())
            marks = random_marks(other, range(len(other.tokens)), n_marks, latent.latent)
            place = seed_of("place", latent.latent, index) % self.size
            items = [item(window.tokens, window.marks()) for window in own]
            items.insert(place, item(other.tokens, marks))
            made.append((items, place + 1))
        return made
