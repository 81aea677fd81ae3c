"""Clients that are no language models: they give fixed, random or right answers, or fail."""

import random
from collections.abc import Sequence

from sae.explain.judges import RuleJudge, read_question
from sae.explain.llm.chat import (
    ConstantClient,
    Request,
    Response,
    UnavailableError,
    canonical,
    key_of,
    reply,
)
from sae.explain.windows import Rule

RANGES = {"detection": (0, 1), "fuzzing": (0, 1), "rubric": (0, 3), "simulation": (0, 10)}
"""The least and the largest number of an answer."""


class ScriptedClient:
    """Gives its answers in turn, then the last one for ever."""

    def __init__(self, answers: Sequence[str | Exception], name: str = "scripted") -> None:
        """Keep the answers; an exception among them is raised."""
        self._answers, self.name = list(answers), name
        self.requests: list[Request] = []
        """What was asked."""

    async def complete(self, request: Request) -> Response:
        """The next answer."""
        answer = self._answers[min(len(self.requests), len(self._answers) - 1)]
        self.requests.append(request)
        if isinstance(answer, Exception):
            raise answer
        return reply(request, answer)


class RandomClient:
    """Answers by a generator that is seeded by the question."""

    def __init__(self, seed: int = 0) -> None:
        """Keep the seed."""
        self._seed = seed
        self.name = f"random {seed}"

    async def complete(self, request: Request) -> Response:
        """A well-formed answer without any knowledge."""
        task, lines = request.prompt.split("/", 1)[0], request.messages[-1].content.split("\n")
        n = sum(line[:1].isdigit() for line in lines)
        dice = random.Random(f"{self._seed} {key_of(canonical(self.name, request))}")
        if task == "intruder":
            return reply(request, f"[{dice.randint(1, max(n, 1))}]")
        if task in RANGES:
            return reply(request, str([dice.randint(*RANGES[task]) for _ in range(n)]))
        return reply(request, f"LABEL: word {dice.randint(0, 10**6)}")


class FlakyClient:
    """Another client that often fails, as endpoints do."""

    def __init__(
        self, client: RandomClient | ConstantClient | ScriptedClient, rate: float, seed: int = 0
    ) -> None:
        """Keep the client and how often it fails; the name is the client's."""
        self._client, self._rate, self._dice = client, rate, random.Random(seed)
        self.name = client.name
        self.n_calls = 0
        """Calls, failed or not."""

    async def complete(self, request: Request) -> Response:
        """Fail in one of six ways, or answer."""
        self.n_calls += 1
        if self._dice.random() >= self._rate:
            return await self._client.complete(request)
        match self._dice.randrange(6):
            case 0:
                raise UnavailableError("rate", "slow down", retry_after=0.001)
            case 1:
                raise UnavailableError("transport", "internal server error")
            case 2:
                raise UnavailableError("transport", "connection reset", was_sent=True)
            case 3:
                return Response("", "refusal", 5, 0)
            case 4:
                return Response("[1, 0,", "length", 5, 5)
            case _:
                return reply(request, "I would rather talk about something else.")


class OracleClient:
    """Reads every question back from its prompt and answers it by a rule.

    That it can is the proof that prompts say what they should: a text that forged a mark or an item
    would make it wrong.
    """

    def __init__(self, rule: Rule, label: str, name: str = "oracle") -> None:
        """Keep the rule, what it is called in words, and a name."""
        self._judge, self._label, self.name = RuleJudge(rule), label, f"{name} {label}"

    async def complete(self, request: Request) -> Response:
        """The right answer."""
        task, _, items = read_question(request)
        if task.startswith("explain"):
            return reply(request, f"LABEL: {self._label}")
        numbers = [round(number) for number in self._judge.decide(task, items)]
        return reply(request, str(numbers))
