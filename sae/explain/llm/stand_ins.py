"""Clients that are no language models: for tests, for trying a pipeline, for chance floors."""

import json
import random
from collections.abc import Sequence

from sae.explain.llm.chat import (
    Request,
    Response,
    UnavailableError,
    canonical,
    key_of,
)

_N_TEXTS = 10
_RANGES = {"detection": (0, 1), "fuzzing": (0, 1), "rubric": (0, 3), "simulation": (0, 10)}


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


class ConstantClient:
    """Says the same to everybody: one number per item, or one label."""

    def __init__(self, number: int = 0, label: str = "something") -> None:
        """Keep both."""
        self._number, self._label = number, label
        self.name = f"constant {number} {label}"

    async def complete(self, request: Request) -> Response:
        """The constant in the form that the question wants."""
        task, n = _task(request), _n_items(request)
        if task == "intruder":
            return reply(request, f"[{max(1, min(self._number, n))}]")
        if task in _RANGES:
            return reply(request, str([self._number] * n))
        if task == "texts":
            return reply(request, json.dumps([self._label] * _N_TEXTS))
        return reply(request, f"LABEL: {self._label}")


class RandomClient:
    """Answers by a generator that is seeded by the question."""

    def __init__(self, seed: int = 0) -> None:
        """Keep the seed."""
        self._seed = seed
        self.name = f"random {seed}"

    async def complete(self, request: Request) -> Response:
        """A well-formed answer without any knowledge."""
        task, n = _task(request), _n_items(request)
        dice = random.Random(f"{self._seed} {key_of(canonical(self.name, request))}")
        if task == "intruder":
            return reply(request, f"[{dice.randint(1, max(n, 1))}]")
        if task in _RANGES:
            return reply(request, str([dice.randint(*_RANGES[task]) for _ in range(n)]))
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


def reply(request: Request, text: str) -> Response:
    """An answer with token counts of the usual size."""
    return Response(text, "stop", max(1, request.n_characters // 4), max(1, len(text) // 4))


def _task(request: Request) -> str:
    return request.prompt.split("/", 1)[0]


def _n_items(request: Request) -> int:
    lines = request.messages[-1].content.split("\n")
    return sum(line[:1].isdigit() for line in lines)
