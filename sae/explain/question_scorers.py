"""Detection and fuzzing: does the label tell windows, or marks, that are the latent's?

Intruder: can the window that is not the latent's be told, without any explanation?

Rubric: how specific is the latent at each level of activation? (Templeton et al. 2024).

Simulation: does the label predict the activation of every token? (Bills et al. 2023).
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from sae.explain.judges import Judge, Score, ask, ask_in_batches, scored, simulated
from sae.explain.llm.corpus_text import Item, item
from sae.explain.windows import NEGATIVES, LatentWindows, Window, seed_of, shuffled
from sae.statistics import Interval, correlation, weighted_sum, wilson


class _Asked(NamedTuple):
    """One item, and what is true of it."""

    item: Item
    source: str  # "active", or the source of a negative
    weight: float  # 1 / probability of inclusion


@dataclass(frozen=True)
class Detection:
    """Which windows contain what the label says?

    value = mean over the sources s of (TPR + TNR_s) / 2, TPR the share of active windows that are
    named and TNR_s the share of the negatives of source s that are not; floor 0.5. Answering "none"
    or "all" gives exactly the floor, whatever the numbers of windows.
    """

    batch: int = 10
    """Windows per question."""
    name: str = "detection"
    """Its name in the results."""

    async def score(self, latent: LatentWindows, explanation: str, judge: Judge) -> Score:
        """Ask about active windows and negatives in mixed order."""
        windows = latent.of("score", "active", *NEGATIVES)
        asked = [_Asked(item(w.tokens), w.source, 1 / w.inclusion) for w in windows]
        asked = shuffled(asked, "detection", latent.latent)
        items = [each.item for each in asked]
        answers = await ask_in_batches(judge, "detection", explanation, items, self.batch)
        return balanced_accuracy(self.name, asked, answers)


@dataclass(frozen=True)
class Fuzzing:
    """Are the marked words what the label says?

    The same figure as detection's. Negatives are the same active windows with the marks moved to
    silent tokens ("moved"), and negatives of every source with as many marks at random.
    """

    batch: int = 10
    """Windows per question."""
    name: str = "fuzzing"
    """Its name in the results."""

    async def score(self, latent: LatentWindows, explanation: str, judge: Judge) -> Score:
        """Ask about right marks and wrong ones in mixed order."""
        asked = shuffled(_marked_windows(latent), "fuzzing", latent.latent)
        items = [each.item for each in asked]
        answers = await ask_in_batches(judge, "fuzzing", explanation, items, self.batch)
        return balanced_accuracy(self.name, asked, answers)


def _marked_windows(latent: LatentWindows) -> list[_Asked]:
    asked, n_marks = [], 1
    for place, window in enumerate(latent.of("score", "active")):
        marks = window.marks()
        n_marks = sum(marks)
        asked.append(_Asked(item(window.tokens, marks), "active", 1 / window.inclusion))
        silent = [index for index, value in enumerate(window.activations) if value == 0]
        if place % 2 and len(silent) >= n_marks:  # half of them, so that both kinds are as many
            moved = random_marks(window, silent, n_marks, latent.latent)
            asked.append(_Asked(item(window.tokens, moved), "moved", 1.0))
    for window in latent.of("score", *NEGATIVES):
        marks = random_marks(window, range(len(window.tokens)), n_marks, latent.latent)
        asked.append(_Asked(item(window.tokens, marks), window.source, 1.0))
    return asked


def random_marks(window: Window, allowed: Sequence[int], n: int, latent: int) -> list[bool]:
    """Marks on n of the allowed tokens, by a hash of where the window lies."""
    worded = [index for index in allowed if window.tokens[index].strip()] or list(allowed)
    order = sorted(
        worded, key=lambda index: seed_of("marks", latent, window.example, window.start, index)
    )
    chosen = set(order[:n])
    return [index in chosen for index in range(len(window.tokens))]


def balanced_accuracy(name: str, asked: Sequence[_Asked], answers: Sequence[float | None]) -> Score:
    """The score of yes-or-no answers about active windows and negatives from several sources."""
    right = {
        source: [
            None if answer is None else (answer > 0.5) == (each.source == "active")
            for each, answer in zip(asked, answers, strict=True)
            if each.source == source
        ]
        for source in dict.fromkeys(each.source for each in asked)
    }
    count = len(answers), sum(answer is None for answer in answers)
    answered = {s: [r for r in rs if r is not None] for s, rs in right.items()}
    sources = [source for source in right if source != "active" and answered[source]]
    if not answered.get("active") or not sources:
        what = "active windows" if not answered.get("active") else "negatives"
        return Score(name, 0.5, *count, reason=f"no answered {what}")
    shares = {
        source: wilson(sum(answered[source]), len(answered[source]))
        for source in answered
        if answered[source]
    }
    per_source = {s: (shares["active"].value + shares[s].value) / 2 for s in sources}
    hits = [
        (e.weight, a > 0.5)
        for e, a in zip(asked, answers, strict=True)
        if e.source == "active" and a is not None
    ]
    natural = sum(weight * hit for weight, hit in hits) / sum(weight for weight, _ in hits)
    details = {"recall": shares["active"].value, "recall_natural": natural}
    bounds = _with_failed(right, sources, 0), _with_failed(right, sources, 1)
    interval = _mean_of(shares, sources)
    return scored(
        Score(name, 0.5, *count), interval, bounds, per_source=per_source, details=details
    )


def _mean_of(shares: dict[str, Interval], sources: list[str]) -> Interval:
    parts = [(0.5, shares["active"]), *((0.5 / len(sources), shares[s]) for s in sources)]
    return weighted_sum(parts)


def _with_failed(right: dict[str, list[bool | None]], sources: list[str], as_what: int) -> float:
    def share(source: str) -> float:
        return sum(as_what if r is None else r for r in right[source]) / len(right[source])

    return share("active") / 2 + sum(map(share, sources)) / len(sources) / 2


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
        result = await asyncio.gather(*(ask(judge, "intruder", "", items) for items, _ in sets))
        right = [
            None if answer is None else answer == [place]
            for answer, (_, place) in zip(result, sets, strict=True)
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
            active_here = active[index * (self.size - 1) : (index + 1) * (self.size - 1)]
            other = others[index]
            n_marks = sum(active_here[0].marks())
            marks = random_marks(other, range(len(other.tokens)), n_marks, latent.latent)
            place = seed_of("place", latent.latent, index) % self.size
            items = [item(window.tokens, window.marks()) for window in active_here]
            items.insert(place, item(other.tokens, marks))
            made.append((items, place + 1))
        return made


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
        levels = np.array([window.step for window, _ in known], np.float64)
        natural = np.array([1 / window.inclusion for window, _ in known])
        details = {"natural": float((grades * natural).sum() / natural.sum() / _HIGHEST)}
        details |= curve(levels, grades)
        total = grades.sum() / _HIGHEST
        bounds = total / count[0], (total + count[1]) / count[0]
        interval = _mean(grades / _HIGHEST)
        return scored(Score(self.name, 0.0, *count), interval, bounds, details=details)


def curve(levels: np.ndarray, grades: np.ndarray) -> dict[str, float]:
    """Mean and shares of the grades at each level, and how they go together."""
    results: dict[str, float] = {}
    for level in np.unique(levels):
        here = grades[levels == level]
        results[f"level {level:.0f}"] = float(here.mean())
        for grade in range(_HIGHEST + 1):
            results[f"level {level:.0f} grade {grade}"] = float((here == grade).mean())
    if len(np.unique(levels)) > 1 and len(np.unique(grades)) > 1:
        results["spearman"] = float(
            np.corrcoef(stats.rankdata(levels), stats.rankdata(grades))[0, 1]
        )
    return results


def _mean(values: np.ndarray) -> Interval:
    """Mean of values from 0 to 1: Wilson's interval with the trials that their spread is worth."""
    n, mean = len(values), float(values.mean())
    spread = float(values.var(ddof=1)) if n > 1 else 0.0
    worth = min(max(mean * (1 - mean) * n / spread, 1.0), 9.0 * n) if spread > 0 else float(n)
    return wilson(mean * worth, worth)


@dataclass(frozen=True)
class Simulation:
    """Correlation of predicted and real activations over the tokens of all windows together.

    Pearson's, with Spearman's in the details; floor 0. A level is its expectation where the answer
    has probabilities of its digits, else the digit that was written; `details` has the share of the
    former. Where either side is constant the correlation is undefined, and said to be so. A failed
    window is left out of the value; `worst` and `best` count its share as -1 and 1.
    """

    n_random: int = 10
    """Random negatives that stand beside the active windows."""
    name: str = "simulation"
    """Its name in the results."""

    async def score(self, latent: LatentWindows, explanation: str, judge: Judge) -> Score:
        """Ask about one window at a time."""
        made = await simulate(latent, explanation, judge, self.n_random)
        predicted, real = made.predicted, [window.activations for window in made.windows]
        count = made.n, made.n - len(predicted)
        seed = seed_of("simulation", latent.latent)
        interval = correlation(predicted, real, seed=seed) if predicted else None
        if interval is None:
            flat = "undefined: the predictions or the activations are constant"
            return Score(
                self.name, 0.0, *count, reason=flat if predicted else "no answered windows"
            )
        missing = count[1] / count[0]
        value_counted = interval.value * (1 - missing)
        ranked = correlation(predicted, real, ranks=True, seed=seed)
        details = {EXPECTED: made.share_expected}
        details |= {} if ranked is None else {"spearman": ranked.value}
        bounds = value_counted - missing, value_counted + missing
        return scored(Score(self.name, 0.0, *count), interval, bounds, details=details)


EXPECTED = "share from log-probabilities"
"""Of the levels, those that are expectations; the others are digits that were written."""


class Simulated(NamedTuple):
    """The windows that a judge simulated."""

    windows: list[Window]
    predicted: list[list[float]]
    """Of each: a level from 0 to 10 for each token."""
    n: int
    """Windows that were asked about."""
    share_expected: float
    """Of the levels, those that are expectations from probabilities."""


async def simulate(
    latent: LatentWindows, explanation: str, judge: Judge, n_random: int
) -> Simulated:
    """Ask for the levels of the active windows and of some random ones."""
    windows = latent.of("score", "active") + latent.of("score", "random")[:n_random]
    asked = [
        simulated(judge, explanation, [item([token or " "]) for token in window.tokens])
        for window in windows
    ]
    pairs = zip(windows, await asyncio.gather(*asked), strict=True)
    known = [(window, levels) for window, levels in pairs if levels is not None]
    n_expected = sum(levels.n_expected for _, levels in known)
    n_levels = max(sum(len(levels.values) for _, levels in known), 1)
    return Simulated(
        [window for window, _ in known], [levels.values for _, levels in known], len(windows),
        n_expected / n_levels,
    )  # fmt: skip
