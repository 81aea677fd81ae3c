"""What the calls may cost: estimated before the first, reserved before each, settled after it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from sae.explain.llm.chat import CallFailedError, Request, Response
from sae.explain.llm.config import LLMConfig

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
