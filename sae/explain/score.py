"""What every scorer returns, and how items are asked about in batches."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from sae.explain.judges import Judge, Task
from sae.explain.llm.chat import CallFailedError
from sae.explain.llm.corpus_text import Item
from sae.explain.windows import LatentWindows
from sae.statistics import Interval


@dataclass(frozen=True)
class Score:
    """How good an explanation is by one scorer; without a value it says why."""

    scorer: str
    """Name of the scorer."""
    floor: float
    """What knowing nothing gives."""
    n: int
    """Items, answered or not."""
    n_failed: int
    """Items without a usable answer; they are in `n`, in `worst` and in `best`."""
    value: float | None = None
    """The score over the answered items; None where there is none to give."""
    low: float | None = None
    """Lower end of its 95 % interval."""
    high: float | None = None
    """Upper end."""
    worst: float | None = None
    """The score if every failed item had been answered wrongly."""
    best: float | None = None
    """The score if every failed item had been answered rightly."""
    per_source: dict[str, float] = field(default_factory=dict)
    """The score against each source of negatives alone."""
    details: dict[str, float] = field(default_factory=dict)
    """Further figures by name."""
    reason: str = ""
    """Why there is no value."""
    lost: dict[str, int] = field(default_factory=dict)
    """Questions that ended without an answer, by reason."""

    def __post_init__(self) -> None:
        """A figure that is not finite is a fault of ours."""
        for name in ("value", "low", "high", "worst", "best"):
            figure = getattr(self, name)
            assert figure is None or math.isfinite(figure), (self.scorer, name, figure)


def scored(
    base: Score,
    interval: Interval,
    bounds: tuple[float, float],
    *,
    per_source: dict[str, float] | None = None,
    details: dict[str, float] | None = None,
) -> Score:
    """A score with a value.

    Args:
        base: Its name, floor and counts.
        interval: The figure over what was answered.
        bounds: The figure again with the failed items wrong, and right.
        per_source: Against each source of negatives.
        details: Further figures.
    """
    return replace(
        base,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        worst=float(bounds[0]),
        best=float(bounds[1]),
        per_source=per_source or {},
        details=details or {},
    )


@runtime_checkable
class Scorer(Protocol):
    """One way to score an explanation."""

    @property
    def name(self) -> str:
        """Its name in the results."""
        ...

    async def score(self, latent: LatentWindows, explanation: str, judge: Judge) -> Score:
        """The score of the explanation on the latent's score windows."""
        ...


async def ask_in_batches(
    judge: Judge, task: Task, explanation: str, items: Sequence[Item], size: int
) -> list[float | None]:
    """One answer per item, None for the items of a batch that failed."""
    batches = [items[first : first + size] for first in range(0, len(items), size)]
    asked = [ask(judge, task, explanation, batch) for batch in batches]
    answers: list[float | None] = []
    for batch, result in zip(batches, await asyncio.gather(*asked), strict=True):
        answers += [None] * len(batch) if result is None else result
    return answers


async def ask(
    judge: Judge, task: Task, explanation: str, items: Sequence[Item]
) -> list[float] | None:
    """The answers about items that belong together; None if they failed."""
    try:
        return await judge.answer(task, explanation, items)
    except CallFailedError as error:
        if error.reason == "budget":  # not a failure of the question: the run ends here
            raise
        return None
