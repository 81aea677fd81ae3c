"""Questions to a client, through the store, within the budget, made again after failures.

All that becomes of a question is counted here: per latent, per score and for the run.
"""

import asyncio
import contextlib
import logging
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar, runtime_checkable

from sae.explain.config import LLMConfig
from sae.explain.llm.chat import (
    OPEN,
    AdaptedError,
    CallFailedError,
    Client,
    EndpointError,
    Reason,
    ReplayMissError,
    Request,
    Response,
    UnavailableError,
    canonical,
    key_of,
)
from sae.explain.llm.form import Form
from sae.explain.llm.store import AnswerCache, Budget, Reservation

_log = logging.getLogger(__name__)
_LONGEST_PAUSE = 8.0
_LONGEST_WAIT = 60.0
_WARM = 0.7
_MORE_ROOM = 2048
_ASKED_AGAIN: tuple[Reason, ...] = ("refusal", "parse", "length")
_COUNTED: tuple[Reason, ...] = (*_ASKED_AGAIN, "request", "context", "budget")
_CHANGES_PER_CALL = 12

T = TypeVar("T")


@dataclass
class Tally:
    """What became of questions."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """Questions that were "answered", shortened prompts, and unusable answers by their reason."""
    lost: Counter[str] = field(default_factory=Counter)
    """Questions that ended without an answer, by reason."""
    words: dict[str, str] = field(default_factory=dict)
    """The first that was said for each reason."""

    @property
    def n_open(self) -> int:
        """Questions that a later run asks again."""
        return sum(self.lost[reason] for reason in OPEN)


_TALLIES: ContextVar[tuple[Tally, ...]] = ContextVar("tallies", default=())


@contextlib.contextmanager
def tallied() -> Iterator[Tally]:
    """Count what becomes of the questions that are asked inside the block."""
    tally = Tally()
    token = _TALLIES.set((*_TALLIES.get(), tally))
    try:
        yield tally
    finally:
        _TALLIES.reset(token)


@runtime_checkable
class Adaptive(Protocol):
    """A client whose requests can take another form."""

    form: Form
    """It."""


class Caller:
    """Asks questions; everything an explainer or scorer needs of a language model.

    The answer to a question that was asked before comes from the store. Failures of the endpoint
    are tried again after a pause that doubles; while it is busy all calls wait as one, and one of
    them asks first. An answer that is refused, cut off or not readable is stored and the question
    asked again, warmer, with another seed, and after a cut with more room. All this is a function
    of the question alone, so results do not depend on the order or on what runs beside.
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
        self.budget = Budget(config, None if cache is None else cache.ledger)
        self.form = client.form if isinstance(client, Adaptive) else Form()
        """What was learned of the service."""
        self.tally = Tally()
        """What became of all questions."""
        self.failures: Counter[str] = Counter()
        """Failed calls and unusable answers by reason; a question that succeeded later counts."""
        self.n_cached = 0
        """Answers that came from the store."""
        self.on_wait: Callable[[str], None] | None = None
        """Called with a line when all calls begin to wait for a busy service."""
        self._sleep = sleep
        self._slots = asyncio.Semaphore(config.concurrency)
        self._scout = asyncio.Lock()
        self._is_flowing = False
        self._in_a_row = self._waits = self._n_waits = 0
        self._ever_answered = False
        self._not_before = 0.0
        self._refused: dict[str, tuple[str, int]] = {}
        self._answered: set[str] = set()
        if cache is not None and config.cache_mode != "replay":
            self.form.recall(cache.learned(client.name))

    async def ask(self, request: Request, read: Callable[[str], T], *, is_last: bool = True) -> T:
        """Ask until `read` can read the answer's text; see `ask_whole`."""
        return await self.ask_whole(request, lambda answer: read(answer.text), is_last=is_last)

    async def ask_whole(
        self, request: Request, read: Callable[[Response], T], *, is_last: bool = True
    ) -> T:
        """Ask until `read` can read the answer.

        Args:
            request: The question.
            read: Reads the answer; raises CallFailedError where it cannot.
            is_last: Whether nothing shorter is asked where it exceeds the model's context.

        Raises:
            CallFailedError: If there is no usable answer after all attempts.
            EndpointError: If the endpoint does not serve us; nothing more should be asked.
            ReplayMissError: If an answer is missing in replay mode.
        """
        failure, room = None, request.max_tokens
        for attempt in range(self.config.attempts):
            # At temperature 0 the same question has the same unusable answer.
            warm = request.temperature if attempt == 0 else max(request.temperature, _WARM)
            again = replace(request, seed=request.seed + attempt, temperature=warm, max_tokens=room)
            try:
                response = await self._answer(again)
                result = read(_usable(response))
            except CallFailedError as error:
                self._count(error)
                failure = error
                if error.reason not in _ASKED_AGAIN:
                    break
                if error.reason == "length":
                    room = max(room, min(max(8 * room, _MORE_ROOM), self.config.longest_answer))
            else:
                self._succeeded(request, room)
                return result
        assert failure is not None
        if is_last or failure.reason != "context":
            self._lose(request, failure)
        raise failure

    def note(self, outcome: str) -> None:
        """Count something that happened to a question, such as that it was shortened."""
        for tally in (self.tally, *_TALLIES.get()):
            tally.outcomes[outcome] += 1

    def _count(self, error: CallFailedError) -> None:
        """Count an answer that is of no use, or a question that gets none."""
        self.failures[error.reason] += error.reason in _COUNTED
        for tally in (self.tally, *_TALLIES.get()):
            tally.outcomes[error.reason] += 1
            tally.words.setdefault(error.reason, error.detail)

    def _succeeded(self, request: Request, room: int) -> None:
        self.note("answered")
        self._answered.add(request.prompt)
        if room > max(request.max_tokens, self.form.room):  # thoughts come first: others need it
            self.form.room = room
            self._keep_form()

    def _lose(self, request: Request, error: CallFailedError) -> None:
        """Count a question that ended without an answer.

        Raises:
            EndpointError: If all questions of its kind were refused in the same words.
        """
        for tally in (self.tally, *_TALLIES.get()):
            tally.lost[error.reason] += 1
        if error.reason not in ("request", "context") or request.prompt in self._answered:
            return
        words = re.sub(r"[0-9a-f-]*\d[0-9a-f-]*", "#", error.detail)
        before, n = self._refused.get(request.prompt, (words, 0))
        n = n + 1 if words == before else 1
        self._refused[request.prompt] = words, n
        if n >= self.config.stop_after_refusals:
            raise EndpointError(
                f"{self.client.name} must answer {request.prompt}, got {n} equal refusals from the "
                f"first on: {error.detail}; change the settings of llm"
            ) from error

    async def _answer(self, request: Request) -> Response:
        question = canonical(self.client.name, request)
        key = key_of(question)
        result = None if self.cache is None else self.cache.get(key)
        if result is not None:
            self.n_cached += 1
            return result
        if self.config.cache_mode == "replay":
            refusal = None if self.cache is None else self.cache.refused(key)
            if refusal is not None:
                raise refusal
            raise ReplayMissError(
                f"every answer must be in the cache to be replayed, got none for {request.prompt} "
                f"({key[:12]}); run once with llm.cache_mode=read-write"
            )
        try:
            async with self._slots:
                response = await self._call(request)
        except CallFailedError as error:
            if self.cache is not None and error.reason in ("request", "context"):
                self.cache.put_refusal(key, error)
            raise
        if self.cache is not None:
            self.cache.put(key, question, response)
        return response

    async def _call(self, request: Request) -> Response:
        """Call until the endpoint answers: `retries` times more at most, and waits besides."""
        pauses = random.Random(key_of(canonical("pauses", request)))
        n_failed = n_changes = 0
        while True:
            try:
                return await self._in_turn(request)
            except AdaptedError:
                n_changes += 1
                self._adapted()
                if n_changes >= _CHANGES_PER_CALL:
                    raise
            except UnavailableError as error:
                self.failures[error.reason] += 1
                if error.reason == "rate":
                    continue
                n_failed += 1
                self._give_up_if_down(error, is_last=n_failed > self.config.retries)
                if n_failed > self.config.retries:
                    raise
                await self._pause(error, n_failed - 1, pauses)

    async def _in_turn(self, request: Request) -> Response:
        """One call; until the service has answered, and after it was busy, one goes first."""
        if not self._is_flowing:
            async with self._scout:
                if not self._is_flowing:
                    return await self._once(request)
        return await self._once(request)

    async def _once(self, request: Request) -> Response:
        await self._wait()
        name = None
        if getattr(self.client, "is_deferred", False):
            name = key_of(canonical(self.client.name, request))
        asked = replace(request, max_tokens=self.form.wire(request))
        reserved = await self.budget.begin(asked, name)
        try:
            return await self._sent(request, reserved, name)
        finally:
            self.budget.end()

    async def _sent(self, request: Request, reserved: Reservation, name: str | None) -> Response:
        n_waits = self._n_waits
        try:
            async with asyncio.timeout(self.config.timeout_s):
                response = await self.client.complete(request)
        except TimeoutError:
            self.budget.lose(reserved, was_sent=True)
            detail = f"no answer within {self.config.timeout_s:g} s"
            raise UnavailableError("transport", detail, was_sent=True) from None
        except CallFailedError as error:
            if name is not None and reserved.is_new and error.reason != "pending":
                self.budget.release(reserved)  # what is known of an earlier run is not asked again
            elif error.reason != "pending":
                was_sent = isinstance(error, UnavailableError) and error.was_sent
                self.budget.lose(reserved, was_sent=was_sent)
            if isinstance(error, UnavailableError) and error.reason == "rate":
                self._hold(error, is_late=n_waits != self._n_waits)
            raise
        except BaseException:
            self.budget.lose(reserved, was_sent=True)
            raise
        self.budget.settle(reserved, response)
        self._in_a_row = self._waits = 0
        self._ever_answered = self._is_flowing = True
        return response

    def _adapted(self) -> None:
        """A field was refused; from now on requests have another form."""
        self.failures["adapted"] += 1
        if self.form.notes and self.form.notes[-1] not in self.tally.words.values():
            self.tally.words[f"adapted {len(self.form.notes)}"] = self.form.notes[-1]
            _log.warning("%s: %s", self.client.name, self.form.notes[-1])
            self._keep_form()

    def _keep_form(self) -> None:
        if self.cache is not None and isinstance(self.client, Adaptive):
            self.cache.learn(self.client.name, self.form.learned())

    def _give_up_if_down(self, error: UnavailableError, *, is_last: bool) -> None:
        self._in_a_row += 1
        too_many = self._in_a_row >= self.config.give_up_after
        if too_many or (is_last and not self._ever_answered):
            raise EndpointError(
                f"{self.client.name} must answer, got {self._in_a_row} failed calls in a row, the "
                f"last: {error}"
            ) from error

    def _hold(self, error: UnavailableError, *, is_late: bool) -> None:
        """Let all calls wait for a busy service.

        Args:
            error: What it said.
            is_late: Whether the call was sent before the wait that is on: it adds none of its own.

        Raises:
            EndpointError: If it asks for too long a wait, or does not answer after many.
        """
        now, asked = asyncio.get_running_loop().time(), error.retry_after or 0.0
        if asked > self.config.max_wait_s:
            raise EndpointError(
                f"{self.client.name} must be free within max_wait_s={self.config.max_wait_s:g} s, "
                f"got a wait of {asked:,.0f} s: {error.detail}; run the same command again then"
            ) from error
        self._is_flowing = False
        if is_late:
            self._not_before = max(self._not_before, now + asked)
            return
        self._waits, self._n_waits = self._waits + 1, self._n_waits + 1
        if self._waits > self.config.retries:
            raise EndpointError(
                f"{self.client.name} must be free after {self.config.retries} waits, got no answer "
                f"between them, the last: {error}; run the same command again later"
            ) from error
        pause = min(8 * self.config.backoff_s * 2 ** (self._waits - 1), _LONGEST_WAIT)
        pause = max(pause, asked)
        self._not_before = now + pause
        line = f"waiting {pause:.0f} s, the service is busy: {error.detail[:80]}"
        _log.log(logging.WARNING if pause > 30 else logging.INFO, "%s", line)
        if self.on_wait is not None:
            self.on_wait(line)

    async def _pause(self, error: UnavailableError, retry: int, pauses: random.Random) -> None:
        pause = min(self.config.backoff_s * 2**retry, _LONGEST_PAUSE) * (0.5 + pauses.random())
        pause = max(pause, min(error.retry_after or 0.0, self.config.max_wait_s))
        _log.info("%s; again in %.1f s", error, pause)
        await self._sleep(pause)

    async def _wait(self) -> None:
        while (until := self._not_before) > (now := asyncio.get_running_loop().time()):
            await self._sleep(until - now)
            if until == self._not_before:  # nobody was asked to wait longer meanwhile
                break


def _usable(response: Response) -> Response:
    if response.finish == "refusal":
        raise CallFailedError("refusal", "the model refused")
    if response.finish == "length":
        raise CallFailedError("length", f"cut off after {response.output_tokens} tokens")
    return response


@contextlib.asynccontextmanager
async def cancelled_on_exit(tasks: list[asyncio.Task]) -> AsyncIterator[None]:
    """Cancel what still runs when the block is left by an error, and wait for it."""
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
