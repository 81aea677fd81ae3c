"""What is asked of a language model, what comes back, and every way in which that can fail.

A busy service says how long to wait: in seconds, milliseconds, dates, resets or words.
One client is no language model: it says the same to everybody.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from itertools import product
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from monosema.checks import MonosemaError

Reason = Literal[
    "transport", "rate", "request", "context", "refusal", "parse", "length", "budget", "pending"
]
"""Why a question has no answer: no connection or no such answer as was promised; too many calls;
the server refuses it; it is longer than the model's context; the model refuses; the answer cannot
be read; it was cut; a limit of the budget; it stands in a batch file that is not answered yet."""

OPEN: tuple[Reason, ...] = ("transport", "rate", "pending")
"""Reasons for which a later run asks again."""


class CallFailedError(Exception):
    """A question that got no usable answer; counted, never a score."""

    def __init__(self, reason: Reason, detail: str) -> None:
        """Keep the kind of failure beside the words."""
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


class UnavailableError(CallFailedError):
    """A failure of the endpoint rather than of the question: worth another call."""

    def __init__(
        self,
        reason: Reason,
        detail: str,
        *,
        retry_after: float | None = None,
        was_sent: bool = False,
    ) -> None:
        """Keep what the endpoint said.

        Args:
            reason: The kind of failure.
            detail: One line.
            retry_after: Seconds that the endpoint asks to wait.
            was_sent: Whether the question may have been read, and so charged.
        """
        super().__init__(reason, detail)
        self.retry_after = retry_after
        self.was_sent = was_sent


class AdaptedError(CallFailedError):
    """The service refused a field, and the form of our requests has changed: ask again at once."""

    def __init__(self, detail: str) -> None:
        """Keep the service's words."""
        super().__init__("request", detail)


class EndpointError(OSError):
    """The endpoint does not serve us at all: a wrong key, no credit, no such model, no answer."""


class UnfinishedError(EndpointError):
    """Something has no answer yet and would be asked again by the same command."""


class ReplayMissError(MonosemaError):
    """A question whose answer is not in the cache, in replay mode."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str
    """What is said."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question; equal requests are the same question and get the same answer."""

    prompt: str
    """Name and version of the prompt, such as "detection/1"."""
    messages: tuple[Message, ...]
    """The conversation so far; the last turn is the user's."""
    max_tokens: int
    """Longest answer."""
    temperature: float = 0.0
    """0 asks for the likeliest answer."""
    seed: int = 0
    """Seed for the endpoint's sampling; no endpoint promises to honour it."""
    alternatives: int = 0
    """Likeliest tokens at each place whose probabilities are asked for; no part of the question."""

    @property
    def n_characters(self) -> int:
        """Length of the conversation."""
        return sum(len(message.content) for message in self.messages)


class AnswerToken(NamedTuple):
    """One token of an answer, and the likeliest ones at its place."""

    text: str
    """What was written."""
    alternatives: tuple[tuple[str, float], ...]
    """Each with its log probability."""


@dataclass(frozen=True)
class Response:
    """One answer."""

    text: str
    """What the model wrote."""
    finish: Literal["stop", "length", "refusal"]
    """Why it stopped."""
    input_tokens: int
    """Tokens that were read."""
    output_tokens: int
    """Tokens that were written."""
    tokens: tuple[AnswerToken, ...] = ()
    """The answer token by token, from an endpoint that gives probabilities."""


@runtime_checkable
class Client(Protocol):
    """Something that answers."""

    @property
    def name(self) -> str:
        """Endpoint and model: part of every answer's key, and free of secrets."""
        ...

    async def complete(self, request: Request) -> Response:
        """Answer, or raise CallFailedError or EndpointError."""
        ...


def canonical(client: str, request: Request) -> str:
    """A question to a client as JSON with one spelling."""
    body = {"client": client, **asdict(request)}
    del body["alternatives"]  # an answer is the same without its probabilities
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def key_of(question: str) -> str:
    """SHA-256 of a canonical question."""
    return hashlib.sha256(question.encode()).hexdigest()


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)(?![a-z])", re.I)
_LONG_UNITS = (
    (re.compile(r"(?<=\d)\s*milliseconds?\b", re.I), "ms"),
    (re.compile(r"(?<=\d)\s*(seconds?|secs?)\b", re.I), "s"),
    (re.compile(r"(?<=\d)\s*(minutes?|mins?)\b", re.I), "m"),
    (re.compile(r"(?<=\d)\s*hours?\b", re.I), "h"),
)
_SAID = re.compile(
    r"(?:try again|retry|wait|retryDelay|reset)\W{0,4}(?:\w+ ){0,3}?(?:in|after|for)?\W{0,4}"
    r"((?:\d+(?:\.\d+)?\s*(?:ms|[smhd])(?![a-z])\s*)+)",
    re.I,
)
_PREFIXES = ("x-ratelimit-", "ratelimit-", "anthropic-ratelimit-", "x-rate-limit-")
_KINDS = ("", "-requests", "-tokens", "-input-tokens", "-output-tokens")


def wanted_wait(headers: Mapping[str, str], words: str, now: float | None = None) -> float | None:
    """Seconds that a service asks to wait, or None.

    Args:
        headers: Of its answer; names in lower case or a mapping that does not mind.
        words: What it said.
        now: Seconds since 1970; the clock's when absent.
    """
    now = time.time() if now is None else now
    result = _milliseconds(headers.get("retry-after-ms"))
    if result is None:
        result = _until(headers.get("retry-after"), now)
    if result is None:
        result = _reset(headers, now)
    if result is None:
        for long, short in _LONG_UNITS:
            words = long.sub(short, words)
        said = _SAID.search(words)
        result = None if said is None else _duration(said[1])
    return None if result is None or math.isnan(result) else max(result, 0.0)


def _reset(headers: Mapping[str, str], now: float) -> float | None:
    """The reset of the limit that is used up; without such a one the latest of all."""
    used_up, others = [], []
    for prefix, kind in product(_PREFIXES, _KINDS):
        for form in (f"{prefix}{{}}{kind}", f"{prefix}{kind[1:]}-{{}}"):
            wait = _until(headers.get(form.format("reset")), now)
            left = (headers.get(form.format("remaining")) or "").strip()
            if wait is not None:
                (used_up if left == "0" else others).append(wait)
    return max(used_up or others, default=None)


def _milliseconds(text: str | None) -> float | None:
    value = _number(text)
    return None if value is None else value / 1000


def _until(text: str | None, now: float) -> float | None:
    """Seconds, a moment since 1970 in seconds or milliseconds, a duration, or a date."""
    if text is None:
        return None
    value = _number(text)
    if value is not None:
        if value > 1e11:
            return value / 1000 - now
        return value - now if value > 1e9 else value
    result = _duration(text)
    if result is not None:
        return result
    try:
        return parsedate_to_datetime(text).timestamp() - now
    except (TypeError, ValueError, OverflowError):
        return _iso(text, now)


def _iso(text: str, now: float) -> float | None:
    try:
        return datetime.fromisoformat(text.strip().replace("Z", "+00:00")).timestamp() - now
    except (ValueError, OverflowError):
        return None


def _duration(text: str) -> float | None:
    """Seconds of a text such as 1m30.5s or 200ms."""
    parts = _DURATION.findall(text.strip())
    joined = "".join(number + unit for number, unit in parts)
    if not parts or joined.lower() != re.sub(r"\s", "", text).lower():
        return None
    return sum(float(number) * _UNITS[unit.lower()] for number, unit in parts)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


_N_TEXTS = 10
_NUMBERS = ("detection", "fuzzing", "rubric", "simulation")
"""Questions whose answer is a number for each item."""


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
        if task in _NUMBERS:
            return reply(request, str([self._number] * n))
        if task == "texts":
            return reply(request, json.dumps([self._label] * _N_TEXTS))
        return reply(request, f"LABEL: {self._label}")


def reply(request: Request, text: str) -> Response:
    """An answer with token counts of the usual size."""
    return Response(text, "stop", max(1, request.n_characters // 4), max(1, len(text) // 4))


def _task(request: Request) -> str:
    return request.prompt.split("/", 1)[0]


def _n_items(request: Request) -> int:
    lines = request.messages[-1].content.split("\n")
    return sum(line[:1].isdigit() for line in lines)
