"""Questions to a client, through the cache, within the budget, made again after failures.

What the calls may cost: estimated before the first, reserved before each, settled after it.
"""

import asyncio
import contextlib
import logging
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from sae.explain.config import LLMConfig
from sae.explain.llm.answers import AnswerCache
from sae.explain.llm.chat import (
    CallFailedError,
    Client,
    EndpointError,
    ReplayMissError,
    Request,
    Response,
    UnavailableError,
    canonical,
    key_of,
)

CHARACTERS_PER_TOKEN = 3.0
"""English has about 4; fewer makes the reservation err on the safe side."""


class Cost(NamedTuple):
    """Calls and tokens."""

    requests: int = 0
    """Calls."""
    input_tokens: int = 0
    """Tokens sent."""
    output_tokens: int = 0
    """Tokens received."""

    def plus(self, other: "Cost", sign: int = 1) -> "Cost":
        """Sum, or with sign -1 the difference."""
        return Cost(*(a + sign * b for a, b in zip(self, other, strict=True)))

    @property
    def tokens(self) -> int:
        """Tokens in both directions."""
        return self.input_tokens + self.output_tokens

    def usd(self, config: LLMConfig) -> float:
        """At the config's prices."""
        sent = self.input_tokens * config.usd_per_million_input
        return (sent + self.output_tokens * config.usd_per_million_output) / 1e6


def most(request: Request) -> Cost:
    """The most that one call is expected to take."""
    sent = math.ceil(request.n_characters / CHARACTERS_PER_TOKEN) + 8 * len(request.messages)
    return Cost(1, sent, request.max_tokens)


def estimate(requests: Iterable[Request]) -> Cost:
    """The most that these calls are expected to take together, if none has to be made again."""
    total = Cost()
    for request in requests:
        total = total.plus(most(request))
    return total


@dataclass
class Budget:
    """Counts what was spent and what is under way, and refuses what could go beyond the limits."""

    config: LLMConfig
    """Prices and limits."""
    spent: Cost = field(default_factory=Cost)
    """Of finished calls."""
    reserved: Cost = field(default_factory=Cost)
    """Of calls under way."""

    def reserve(self, request: Request) -> Cost:
        """Set aside the most that a call can take.

        Raises:
            CallFailedError: With reason "budget", if that would exceed a limit.
        """
        wanted = most(request)
        after = self.spent.plus(self.reserved).plus(wanted)
        limits = (
            ("max_usd", after.usd(self.config)),
            ("max_tokens", after.tokens),
            ("max_requests", after.requests),
        )
        for name, value in limits:
            limit = getattr(self.config, name)
            if limit is not None and value > limit:
                raise CallFailedError("budget", f"{name}={limit} would be exceeded")
        self.reserved = self.reserved.plus(wanted)
        return wanted

    def settle(self, reserved: Cost, response: Response) -> None:
        """Replace a reservation by what the call took; endpoints that do not say are estimated."""
        self.reserved = self.reserved.plus(reserved, -1)
        written = math.ceil(len(response.text) / CHARACTERS_PER_TOKEN)
        received = response.output_tokens or min(written, reserved.output_tokens)
        self.spent = self.spent.plus(
            Cost(1, response.input_tokens or reserved.input_tokens, received)
        )

    def lose(self, reserved: Cost, *, was_sent: bool) -> None:
        """Give back a reservation of a call that failed; what was sent may have been charged."""
        self.reserved = self.reserved.plus(reserved, -1)
        self.spent = self.spent.plus(Cost(1, reserved.input_tokens if was_sent else 0, 0))


_log = logging.getLogger(__name__)
_LONGEST_PAUSE = 8.0
_WARM = 0.7

T = TypeVar("T")


class Caller:
    """Asks questions; everything an explainer or scorer needs of a language model.

    The answer to a question that was asked before comes from the cache. Failures of the endpoint
    are tried again after a pause that doubles; an answer that is refused, cut off or not readable
    is stored and the question asked again, warmer and with another seed. All this is a function of
    the question alone, so results do not depend on the order or on what runs beside.
    """

    def __init__(
        self,
        client: Client,
        config: LLMConfig,
        cache: AnswerCache | None = None,
        *,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """Keep the parts.

        Args:
            client: Who answers.
            config: How, and what it may cost.
            cache: Where answers are kept; None keeps none.
            sleep: How to pause; tests pass another.
        """
        self.client = client
        self.config = config
        self.cache = cache
        self.budget = Budget(config)
        self.failures: Counter[str] = Counter()
        """Failed calls and unusable answers by reason; a question that succeeded later counts."""
        self.n_cached = 0
        """Answers that came from the cache."""
        self._sleep = sleep
        self._slots = asyncio.Semaphore(config.concurrency)
        self._in_a_row = 0
        self._ever_answered = False
        self._not_before = 0.0

    async def ask(self, request: Request, read: Callable[[str], T]) -> T:
        """Ask until `read` can read the answer.

        Args:
            request: The question.
            read: Reads the answer; raises CallFailedError where it cannot.

        Raises:
            CallFailedError: If there is no usable answer after all attempts.
            EndpointError: If the endpoint does not serve us; nothing more should be asked.
            ReplayMissError: If an answer is missing in replay mode.
        """
        failure = None
        for attempt in range(self.config.attempts):
            # At temperature 0 the same question has the same unusable answer.
            warm = request.temperature if attempt == 0 else max(request.temperature, _WARM)
            again = replace(request, seed=request.seed + attempt, temperature=warm)
            response = await self._answer(again)
            try:
                return read(_usable(response))
            except CallFailedError as error:
                self.failures[error.reason] += 1
                failure = error
        assert failure is not None
        raise failure

    async def _answer(self, request: Request) -> Response:
        question = canonical(self.client.name, request)
        key = key_of(question)
        found = None if self.cache is None else self.cache.get(key)
        if found is not None:
            self.n_cached += 1
            return found
        if self.config.cache_mode == "replay":
            raise ReplayMissError(
                f"every answer must be in the cache to be replayed, got none for {request.prompt} "
                f"({key[:12]}); run once with llm.cache_mode=read-write"
            )
        async with self._slots:
            response = await self._call(request)
        if self.cache is not None:
            self.cache.put(key, question, response)
        return response

    async def _call(self, request: Request) -> Response:
        """Call until the endpoint answers, `retries` times more at most."""
        pauses = random.Random(key_of(canonical("pauses", request)))
        for retry in range(self.config.retries + 1):
            await self._wait()
            try:
                return await self._once(request)
            except UnavailableError as error:
                self._note(error)
                if retry == self.config.retries:
                    self._last_of(error)
                    raise
                await self._pause(error, retry, pauses)
        raise AssertionError("unreachable")

    async def _once(self, request: Request) -> Response:
        reserved = self.budget.reserve(request)
        try:
            async with asyncio.timeout(self.config.timeout_s):
                response = await self.client.complete(request)
        except TimeoutError:
            self.budget.lose(reserved, was_sent=True)
            detail = f"no answer within {self.config.timeout_s:g} s"
            raise UnavailableError("transport", detail, was_sent=True) from None
        except UnavailableError as error:
            self.budget.lose(reserved, was_sent=error.was_sent)
            raise
        except BaseException:
            self.budget.lose(reserved, was_sent=True)
            raise
        self.budget.settle(reserved, response)
        self._in_a_row, self._ever_answered = 0, True
        return response

    def _note(self, error: UnavailableError) -> None:
        self.failures[error.reason] += 1
        self._in_a_row += 1
        if self._in_a_row >= self.config.give_up_after:
            raise EndpointError(_no_answer(self.client.name, self._in_a_row, error)) from error

    def _last_of(self, error: UnavailableError) -> None:
        if not self._ever_answered:
            raise EndpointError(_no_answer(self.client.name, self._in_a_row, error)) from error

    async def _pause(self, error: UnavailableError, retry: int, pauses: random.Random) -> None:
        pause = min(self.config.backoff_s * 2**retry, _LONGEST_PAUSE) * (0.5 + pauses.random())
        asked = error.retry_after or 0.0
        if asked > self.config.max_wait_s:
            raise CallFailedError("rate", f"asked to wait {asked:g} s")
        if asked:  # the endpoint speaks to all of us
            self._not_before = max(self._not_before, asyncio.get_running_loop().time() + asked)
        _log.info("%s; again in %.1f s", error, max(pause, asked))
        await self._sleep(max(pause, asked))

    async def _wait(self) -> None:
        left = self._not_before - asyncio.get_running_loop().time()
        if left > 0:
            await self._sleep(left)


def _usable(response: Response) -> str:
    if response.finish == "refusal":
        raise CallFailedError("refusal", "the model refused")
    if response.finish == "length":
        raise CallFailedError("length", f"cut off after {response.output_tokens} tokens")
    return response.text


def _no_answer(name: str, n: int, error: UnavailableError) -> str:
    return f"{name} must answer, got {n} failed calls in a row, the last: {error}"


@contextlib.asynccontextmanager
async def cancelled_together(tasks: list[asyncio.Task]) -> AsyncIterator[None]:
    """Cancel what still runs when the block is left by an error, and wait for it."""
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
