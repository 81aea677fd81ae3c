"""What is done to latents while a model runs, as frozen configs; no torch here.

With f the activation that a latent has at a position and d its direction, an operation g changes
the stream there to h + (g(f) - f) d; what the dictionary does not reconstruct stays as it is.
"""

from dataclasses import dataclass
from typing import Literal

from activations_cache.checks import at_least, require

Unit = Literal["max", "absolute"]
"""`max`: times the largest activation that the latent had when the dictionary was evaluated."""


@dataclass(frozen=True, kw_only=True)
class Clamp:
    """g(f) = value: the latent fires at this strength, whatever the text."""

    latent: int
    """Number of the latent."""
    value: float
    """The activation, in `unit`."""
    unit: Unit = "max"
    """What `value` counts: the latent's largest activation, or the dictionary's own units."""
    kind: Literal["clamp"] = "clamp"
    """Tells the operations apart."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("latent", self.latent, 0)
        _finite("value", self.value)


@dataclass(frozen=True, kw_only=True)
class Add:
    """g(f) = f + value: a constant push along the direction, on top of what is there."""

    latent: int
    """Number of the latent."""
    value: float
    """What is added to the activation, in `unit`."""
    unit: Unit = "max"
    """What `value` counts: the latent's largest activation, or the dictionary's own units."""
    kind: Literal["add"] = "add"
    """Tells the operations apart."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("latent", self.latent, 0)
        _finite("value", self.value)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """g(f) = factor f: changes the stream only where the latent fires by itself."""

    latent: int
    """Number of the latent."""
    factor: float
    """What the activation is multiplied by."""
    kind: Literal["scale"] = "scale"
    """Tells the operations apart."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("latent", self.latent, 0)
        _finite("factor", self.factor)


@dataclass(frozen=True, kw_only=True)
class Ablate:
    """g(f) = 0: the latent is taken out where it fires."""

    latent: int
    """Number of the latent."""
    kind: Literal["ablate"] = "ablate"
    """Tells the operations apart."""

    def __post_init__(self) -> None:
        """Check the range."""
        at_least("latent", self.latent, 0)


Operation = Clamp | Add | Scale | Ablate


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

    def operation(self, latent: int) -> Clamp | Add:
        """What is done to the chosen latent."""
        kind = Clamp if self.mode == "clamp" else Add
        return kind(latent=latent, value=self.strength)


def _finite(field: str, value: float) -> None:
    require(abs(value) < float("inf"), field, "be a finite number", value)
