"""Detection and fuzzing: does the label tell windows, or marks, that are the latent's?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sae.explain.intervals import Interval, weighted_sum, wilson
from sae.explain.judges import Judge
from sae.explain.llm.corpus_text import Item, item
from sae.explain.scorers.score import Score, ask_in_batches, scored
from sae.explain.windows import NEGATIVES, LatentWindows, Window, seed_of, shuffled


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
