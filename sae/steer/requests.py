"""What `sae steer DICT` and `sae find DICT` are asked for, as frozen configs; no torch here."""

from dataclasses import dataclass
from typing import Any, Literal

from activations_cache.checks import at_least, require
from sae.steer.config import SweepConfig, strength


@dataclass(frozen=True, kw_only=True)
class SteerRequest(SweepConfig):
    """What `sae steer DICT` does beside the options that have names of their own."""

    latents: tuple[str, ...]
    """Each NUMBER=CHANGE: 10x (times its maximum), 0.5x norm, 4.5, +2x (added), *3, off."""
    model: str | None = None
    """Directory, .gguf, package:// or hub id; what the dictionary was trained on when absent."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the model; as in training when absent."""
    hook_point: str | None = None
    """Where the dictionary reads, if its files do not say so."""
    neutral: str | None = None
    """A .txt or .jsonl file of text that has nothing to do with the latent; glosses when absent."""
    n_neutral: int = 16
    """Neutral texts."""
    sweep: bool = False
    """Whether many strengths are tried."""
    output: str | None = None
    """Directory of the results; `steer-NAME-LATENT` when absent."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require(bool(self.latents), "latents", "name at least one", self.latents)
        require(
            not self.sweep or len(self.latents) == 1, "latents", "be one to sweep", self.latents
        )
        at_least("n_neutral", self.n_neutral, 1)
        for text in self.latents:
            latent_change(text)


@dataclass(frozen=True, kw_only=True)
class FindRequest:
    """What `sae find DICT` looks for: one of `pos`, `near`, and `prompt` with `target`."""

    pos: tuple[str, ...] = ()
    """Texts in each of which the latents fire."""
    neg: tuple[str, ...] = ()
    """Texts in none of which they fire."""
    where: Literal["any", "last"] = "any"
    """On which token of a text."""
    near: int | None = None
    """Latents with directions like this one's."""
    among: str | None = None
    """The dictionary whose latents are compared with it; the same when absent."""
    prompt: str | None = None
    """Text whose next token is explained."""
    target: str | None = None
    """The token whose logit is explained."""
    against: str | None = None
    """A token whose logit is taken off."""
    n: int = 10
    """Latents that are shown."""
    n_ablated: int = 64
    """Latents that are ablated to see how far attribution can be trusted."""
    first_position: int = 1
    """Positions below this one, the attention sinks, do not count."""
    model: str | None = None
    """Directory, .gguf, package:// or hub id; what the dictionary was trained on when absent."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the model; as in training when absent."""
    hook_point: str | None = None
    """Where the dictionary reads, if its files do not say so."""

    def __post_init__(self) -> None:
        """Check that one thing is asked for."""
        asked = [n for n in ("pos", "near", "prompt") if getattr(self, n) not in {None, ()}]
        require(len(asked) == 1, "pos", "be given, or near, or prompt: one of them", asked)
        require(bool(self.pos) or not self.neg, "neg", "stand beside pos", self.neg)
        given = self.prompt is None or self.target is not None
        require(given, "target", "name the token that is explained", self.target)
        for name in ("n", "n_ablated"):
            at_least(name, getattr(self, name), 1)
        at_least("first_position", self.first_position, 0)


def latent_change(text: str) -> tuple[int, dict[str, Any]]:
    """Read NUMBER=CHANGE as the number of a latent and the words that `Edit` takes.

    Raises:
        ValueError: If it has another form.
    """
    number, equals, change = (part.strip() for part in text.partition("="))
    rule = "have the form NUMBER=CHANGE such as 123=10x, 123=+2x, 123=*3 or 123=off"
    require(number.isdecimal() and bool(equals), "latents", rule, text)
    latent = int(number)
    if change == "off":
        return latent, {"ablate": True}
    if change.startswith("*"):
        found = strength("latents", change[1:])
        require(found.unit == "absolute", "latents", "scale by a plain number", text)
        return latent, {"scale": found.value}
    word = "add" if change.startswith("+") else "clamp"
    change = change.removeprefix("+")
    strength("latents", change)
    return latent, {word: change}
