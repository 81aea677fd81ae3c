"""What is done to latents while a model runs, as frozen configs; no torch here.

With f the activation that a latent has at a position and d its direction, an operation g changes
the stream there to h + (g(f) - f) d; what the dictionary does not reconstruct stays as it is.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from activations_cache.checks import at_least, require

Unit = Literal["max", "norm", "absolute"]
"""`max`: times the largest activation that the latent had when the dictionary was evaluated;
`norm`: what moves the stream by so many times its own norm at that token."""

_STRENGTH = re.compile(r"(?P<value>[-+]?[\d.]+(e[-+]?\d+)?)(?P<unit> ?x ?(max|norm)?)?")


class Strength(NamedTuple):
    """An activation, and what it is counted in."""

    value: float
    """How many."""
    unit: Unit
    """Of what."""


def strength(field: str, given: float | int | str) -> Strength:
    """Read a strength: 4.5 in the dictionary's own units, or "10x max" ("10x"), "0.5x norm".

    Raises:
        ValueError: If the unit is unknown or there is no finite number.
    """
    if not isinstance(given, str):
        _finite(field, float(given))
        return Strength(float(given), "absolute")
    found = _STRENGTH.fullmatch(given.strip())
    try:
        value = float(found["value"]) if found else float("nan")
    except ValueError:
        value = float("nan")
    if found is None or not abs(value) < float("inf"):
        raise ValueError(
            f"{field} must be a number, or one in units of max or norm such as '10x max', "
            f"got {given!r}"
        )
    unit: Unit = "norm" if found[4] == "norm" else "max"
    return Strength(value, unit if found["unit"] else "absolute")


@dataclass(frozen=True, kw_only=True)
class _OfLatent:
    latent: int
    """Number of the latent."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("latent", self.latent, 0)


@dataclass(frozen=True, kw_only=True)
class _WithValue(_OfLatent):
    value: float
    """An activation, in `unit`."""
    unit: Unit = "max"
    """What `value` counts: the latent's largest activation, or the dictionary's own units."""
    only_firing: bool = False
    """Leave the latent alone where it does not fire."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        _finite("value", self.value)


@dataclass(frozen=True, kw_only=True)
class Clamp(_WithValue):
    """g(f) = value: the latent fires at this strength, whatever the text."""

    kind: Literal["clamp"] = "clamp"
    """Tells the operations apart."""


@dataclass(frozen=True, kw_only=True)
class Add(_WithValue):
    """g(f) = f + value: a constant push along the direction, on top of what is there."""

    kind: Literal["add"] = "add"
    """Tells the operations apart."""


@dataclass(frozen=True, kw_only=True)
class Cap(_WithValue):
    """g(f) = min(f, value): the latent fires at most this strongly."""

    kind: Literal["cap"] = "cap"
    """Tells the operations apart."""


@dataclass(frozen=True, kw_only=True)
class Floor(_WithValue):
    """g(f) = max(f, value): the latent fires at least this strongly."""

    kind: Literal["floor"] = "floor"
    """Tells the operations apart."""


@dataclass(frozen=True, kw_only=True)
class Scale(_OfLatent):
    """g(f) = factor f: changes the stream only where the latent fires by itself."""

    factor: float
    """What the activation is multiplied by."""
    kind: Literal["scale"] = "scale"
    """Tells the operations apart."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        _finite("factor", self.factor)


@dataclass(frozen=True, kw_only=True)
class Ablate(_OfLatent):
    """g(f) = 0: the latent is taken out where it fires."""

    kind: Literal["ablate"] = "ablate"
    """Tells the operations apart."""


Operation = Clamp | Add | Cap | Floor | Scale | Ablate


@dataclass(frozen=True, kw_only=True)
class SteerConfig:
    """A steering example: a prompt continued with and without one latent turned up."""

    dictionary: str | None = None
    """Which entry of `saes:`; the first that is not frozen by default."""
    latent: int | None = None
    """Number of the latent; chosen among labelled ones by measured effect when absent."""
    mode: Literal["clamp", "add"] = "clamp"
    """Whether the strength replaces the latent's activation or is added to it."""
    strength: float = 5.0
    """In units of the latent's largest activation."""
    prompt: str = "The"
    """What the model continues."""
    max_new_tokens: int = 40
    """Length of the continuation, at most."""
    n_candidates: int = 32
    """Latents that are tried where none is named; the most promising after a quick look at all."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.latent is not None:
            at_least("latent", self.latent, 0)
        _finite("strength", self.strength)
        require(bool(self.prompt), "prompt", "not be empty", self.prompt)
        at_least("max_new_tokens", self.max_new_tokens, 1)
        at_least("n_candidates", self.n_candidates, 1)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Which strengths are tried, on what, and how much they may cost."""

    strengths: tuple[float, ...] = (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
    """In `unit`."""
    unit: Literal["max", "norm"] = "max"
    """The latent's largest activation, or the norm of the stream at each token."""
    mode: Literal["clamp", "add"] = "clamp"
    """Whether a strength replaces the activation or is added to it."""
    prompts: tuple[str, ...] = ("The",)
    """What is continued."""
    max_new_tokens: int = 40
    """Length of the continuations, at most."""
    positions: Literal["all", "prompt", "generated", "last"] = "all"
    """Which tokens are steered."""
    first_position: int = 1
    """Positions below this one, the attention sinks, are left as they are."""
    max_kl: float = 0.5
    """The largest strength is taken whose KL on neutral text keeps within this, in nats per token.
    """
    seed: int = 0
    """Of the random direction."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("strengths", "prompts"):
            require(bool(getattr(self, name)), name, "name at least one", getattr(self, name))
        for strength in self.strengths:
            _finite("strengths", strength)
        require(all(self.prompts), "prompts", "not be empty", self.prompts)
        at_least("max_new_tokens", self.max_new_tokens, 1)
        at_least("first_position", self.first_position, 0)
        at_least("max_kl", self.max_kl, 0)


def _finite(field: str, value: float) -> None:
    require(abs(value) < float("inf"), field, "be a finite number", value)
