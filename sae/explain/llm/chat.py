"""What is asked of a language model, what comes back, and every way in which that can fail."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal, Protocol, runtime_checkable

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

    @property
    def n_characters(self) -> int:
        """Length of the conversation."""
        return sum(len(message.content) for message in self.messages)


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
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def key_of(question: str) -> str:
    """SHA-256 of a canonical question."""
    return hashlib.sha256(question.encode()).hexdigest()
