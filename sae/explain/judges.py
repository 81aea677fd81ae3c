"""Who answers a scorer's questions: a language model by prompts, or a rule that is executed.

The client that knows the rule: what a perfect language model would say, by executing it.

What every scorer returns, and how items are asked about in batches.
"""

import asyncio
import math
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from sae.explain.llm.caller import Caller
from sae.explain.llm.chat import CallFailedError, Message, Request, Response
from sae.explain.llm.corpus_text import (
    NOTE,
    Item,
    escape,
    expected_numbers,
    items_text,
    read_items,
    read_numbers,
    read_texts,
    unescape,
)
from sae.explain.text_at_rows import words_with_blanks
from sae.explain.windows import LatentWindows, Rule
from sae.statistics import Interval

T = TypeVar("T")

N_ALTERNATIVES = 20
"""Likeliest tokens whose probabilities are asked for: the most that endpoints give."""

N_TEXTS = 10
"""Texts that a judge writes for a label."""

Task = Literal["detection", "fuzzing", "simulation", "rubric", "intruder"]
"""What is asked about a list of items."""


class _Prompt(NamedTuple):
    version: int
    question: str
    low: int
    high: int
    tokens_per_answer: int = 3


_PROMPTS: Mapping[Task, _Prompt] = {
    "detection": _Prompt(1, "Which of the numbered texts contain what the label describes? "
        "Answer with a JSON list of {n} numbers, 1 for a text that does and 0 for one that does "
        "not, in the order of the texts.", 0, 1),
    "fuzzing": _Prompt(1, "In each numbered text some words are marked <<so>>. In which texts are "
        "the marked words what the label describes? Answer with a JSON list of {n} numbers, 1 "
        "where they are and 0 where they are not, in the order of the texts.", 0, 1),
    "simulation": _Prompt(1, "The numbered lines are the {n} tokens of one text. A neuron responds "
        "to what the label describes. Answer with a JSON list of {n} integers from 0 to 10, how "
        "strongly it responds to each token, in their order.", 0, 10, 4),
    "rubric": _Prompt(1, "Grade how well the label fits each numbered text, in which the strongest "
        "response is marked <<so>>. 0: unrelated to all of the text. 1: related, but not near the "
        "marked words, or only vaguely. 2: loosely related to the marked words, or related to what "
        "is near them. 3: it cleanly identifies the marked words. Answer with a JSON list of {n} "
        "integers, in the order of the texts.", 0, 3),
    "intruder": _Prompt(1, "In all numbered texts but one the marked words <<so>> have something "
        "in common. Answer with a JSON list of one number: the number of the text that does not "
        "belong to the others.", 1, 0),
}  # fmt: skip


@runtime_checkable
class Judge(Protocol):
    """Answers questions about items."""

    async def answer(self, task: Task, explanation: str, items: Sequence[Item]) -> list[float]:
        """One number per item; for "intruder" the number of one item, from 1.

        Raises:
            CallFailedError: If there is no usable answer.
        """
        ...


class Levels(NamedTuple):
    """How strongly a latent should fire on each token."""

    values: list[float]
    """0 to 10."""
    n_expected: int = 0
    """How many of them are expectations from probabilities; the others were written."""


@runtime_checkable
class Simulator(Protocol):
    """A judge that says from what its levels come."""

    async def simulate(self, explanation: str, items: Sequence[Item]) -> Levels:
        """A level for each token.

        Raises:
            CallFailedError: If there is no usable answer.
        """
        ...


@runtime_checkable
class Writer(Protocol):
    """A judge that also writes."""

    async def texts(self, explanation: str) -> list[str]:
        """Texts that fit a label.

        Raises:
            CallFailedError: If there is no usable answer.
        """
        ...


def texts_question(explanation: str) -> Request:
    """The request for texts that fit a label."""
    system = (
        f"Write {N_TEXTS} different sentences of ordinary prose that contain what the label "
        f"describes. Answer with a JSON list of {N_TEXTS} strings and nothing else. "
    )
    messages = (Message("system", system + NOTE), Message("user", f"Label: {escape(explanation)}"))
    return Request(prompt="texts/1", messages=messages, max_tokens=48 + 48 * N_TEXTS)


def question(task: Task, explanation: str, items: Sequence[Item]) -> Request:
    """The request that a judge of flesh and weights would get."""
    prompt = _PROMPTS[task]
    system = prompt.question.format(n=len(items)) + " " + NOTE
    label = f"Label: {escape(explanation)}\n\n" if explanation else ""
    n_answers = 1 if task == "intruder" else len(items)
    return Request(
        prompt=f"{task}/{prompt.version}",
        messages=(Message("system", system), Message("user", label + items_text(items))),
        max_tokens=48 + prompt.tokens_per_answer * n_answers,
        alternatives=N_ALTERNATIVES if task == "simulation" else 0,
    )


def allowed(task: str, n_items: int) -> tuple[int, int, int] | None:
    """How many numbers the answer to a task has, the least and the largest; None: no numbers."""
    prompt = next((prompt for name, prompt in _PROMPTS.items() if name == task), None)
    if prompt is None:
        return None
    return (1, 1, n_items) if task == "intruder" else (n_items, prompt.low, prompt.high)


def read_question(request: Request) -> tuple[str, str, list[Item]]:
    """Task, label and items of a request: the inverse of `question`, whatever the texts hold."""
    text = request.messages[-1].content
    first = text.split("\n", 1)[0]
    label = unescape(first.removeprefix("Label: ")) if first.startswith("Label: ") else ""
    return request.prompt.split("/", 1)[0], label, read_items(text)


class LLMJudge:
    """A language model that is asked by prompts."""

    def __init__(self, caller: Caller) -> None:
        """Keep the caller."""
        self._caller = caller

    async def answer(self, task: Task, explanation: str, items: Sequence[Item]) -> list[float]:
        """Ask and read."""
        return (await self._asked(task, explanation, items)).values

    async def simulate(self, explanation: str, items: Sequence[Item]) -> Levels:
        """Ask, and take expectations where the answer has probabilities."""
        return await self._asked("simulation", explanation, items)

    async def _asked(self, task: Task, explanation: str, items: Sequence[Item]) -> Levels:
        known = allowed(task, len(items))
        assert known is not None, task
        is_divisible = len(items) > 1 and task != "intruder"

        def read(answer: Response) -> Levels:
            numbers = read_numbers(*known)(answer.text)
            expected = expected_numbers(answer.tokens, numbers, known[2])
            levels = [n if e is None else e for n, e in zip(numbers, expected, strict=True)]
            return Levels(levels, sum(e is not None for e in expected))

        asked = question(task, explanation, items)
        try:
            return await self._caller.ask_whole(asked, read, is_last=not is_divisible)
        except CallFailedError as error:
            if error.reason != "context" or not is_divisible:
                raise
        self._caller.note("shortened")
        half = len(items) // 2
        halves = (items[:half], items[half:])
        first, second = [await self._asked(task, explanation, part) for part in halves]
        return Levels(first.values + second.values, first.n_expected + second.n_expected)

    async def texts(self, explanation: str) -> list[str]:
        """Ask for texts that fit a label."""
        return await self._caller.ask(texts_question(explanation), read_texts(N_TEXTS))


class RuleJudge:
    """Answers by executing a rule, so every scorer runs without a model."""

    def __init__(self, rule: Rule) -> None:
        """Keep the rule."""
        self._rule = rule

    async def answer(
        self,
        task: Task,
        explanation: str,  # noqa: ARG002
        items: Sequence[Item],
    ) -> list[float]:
        """Execute; the explanation's words are not looked at."""
        return self.decide(task, items)

    def decide(self, task: str, items: Sequence[Item]) -> list[float]:
        """The same without waiting.

        Raises:
            CallFailedError: If the task is not one of these.
        """
        if task == "simulation":
            return [10.0 * strength for strength in self._rule([item.text for item in items])]
        results = [self._strengths(item) for item in items]
        match task:
            case "detection":
                return [float(any(strength > 0.0 for strength, _ in words)) for words in results]
            case "fuzzing":
                return [float(_marked(words)) for words in results]
            case "rubric":
                return [_grade(words) for words in results]
            case "intruder":
                wrong = [number for number, words in enumerate(results, 1) if not _marked(words)]
                return [float(wrong[0] if wrong else 1)]
            case _:
                raise CallFailedError("request", f"a rule cannot do {task}")

    def _strengths(self, item: Item) -> list[tuple[float, bool]]:
        """Strength and mark of each piece."""
        pieces = [
            (piece, span.marked) for span in item.spans for piece in words_with_blanks(span.text)
        ]
        strengths = self._rule([piece for piece, _ in pieces])
        return [(s, marked) for s, (_, marked) in zip(strengths, pieces, strict=True)]


def _marked(words: list[tuple[float, bool]]) -> bool:
    return any(strength > 0.0 and marked for strength, marked in words)


def _grade(words: list[tuple[float, bool]]) -> float:
    if _marked(words):
        return 3.0
    marks = [place for place, (_, marked) in enumerate(words) if marked]
    fits = [place for place, (strength, _) in enumerate(words) if strength > 0.0]
    if not fits:
        return 0.0
    near = any(abs(mark - fit) <= 3 for mark in marks for fit in fits)
    return 2.0 if near else 1.0


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


async def simulated(judge: Judge, explanation: str, items: Sequence[Item]) -> Levels | None:
    """The levels of the tokens of one text; None if they failed."""
    if isinstance(judge, Simulator):
        return await _or_none(judge.simulate(explanation, items))
    levels = await ask(judge, "simulation", explanation, items)
    return None if levels is None else Levels(levels)


async def ask(
    judge: Judge, task: Task, explanation: str, items: Sequence[Item]
) -> list[float] | None:
    """The answers about items that belong together; None if they failed."""
    return await _or_none(judge.answer(task, explanation, items))


async def _or_none(answer: Awaitable[T]) -> T | None:
    try:
        return await answer
    except CallFailedError as error:
        if error.reason == "budget":  # not a failure of the question: the run ends here
            raise
        return None
