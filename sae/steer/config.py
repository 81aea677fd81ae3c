"""What is done to latents; what `sae steer DICT` and `sae find DICT` are asked for; no torch here.

With f the activation that a latent has at a position and d its direction, an operation g changes
the stream there to h + (g(f) - f) d; what the dictionary does not reconstruct stays as it is.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from monosema.checks import LATER, MonosemaError, all_at_least, at_least, require

Unit = Literal["max", "norm", "absolute"]
"""`max`: times the largest activation that the latent had when the dictionary was evaluated;
`norm`: what moves the stream by so many times its own norm at that token."""

_NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"
_STRENGTH = re.compile(rf"(?P<value>{_NUMBER})(?P<unit> ?x ?(?P<of>max|norm)?)?")


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
    value = float(found["value"]) if found else float("nan")
    if found is None or not abs(value) < float("inf"):
        raise MonosemaError(
            f"{field} must be a number, or one in units of max or norm such as '10x max', "
            f"got {given!r}"
        )
    unit: Unit = "norm" if found["of"] == "norm" else "max"
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
    chat: bool = field(default=False, metadata=LATER)
    """Whether the prompt is what a user says, put into the tokenizer's chat template."""
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
class _Prompts:
    """What is continued, and on which tokens it is steered."""

    prompts: tuple[str, ...] = ("The",)
    """What is continued."""
    chat: bool = False
    """Whether the prompts are what a user says, put into the tokenizer's chat template."""
    max_new_tokens: int = 40
    """Length of the continuations, at most."""
    positions: Literal["all", "prompt", "generated", "last"] = "all"
    """Which tokens are steered."""
    first_position: int = 1
    """Positions below this one, the attention sinks, are left as they are."""

    def __post_init__(self) -> None:
        """Check ranges."""
        is_some = bool(self.prompts) and all(text.strip() for text in self.prompts)
        require(is_some, "prompts", "name at least one, none of them empty", self.prompts)
        at_least("max_new_tokens", self.max_new_tokens, 1)
        at_least("first_position", self.first_position, 0)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(_Prompts):
    """Which strengths are tried, on what, and how much they may cost."""

    strengths: tuple[float, ...] = (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
    """In `unit`."""
    unit: Literal["max", "norm"] = "max"
    """The latent's largest activation, or the norm of the stream at each token."""
    mode: Literal["clamp", "add"] = "clamp"
    """Whether a strength replaces the activation or is added to it."""
    max_kl: float = 0.5
    """The largest strength is taken whose KL on neutral text is within this, in nats per token."""
    seed: int = 0
    """Of the random direction."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require(bool(self.strengths), "strengths", "name at least one", self.strengths)
        for strength in self.strengths:
            _finite("strengths", strength)
        at_least("max_kl", self.max_kl, 0)


def _finite(field: str, value: float) -> None:
    require(abs(value) < float("inf"), field, "be a finite number", value)


@dataclass(frozen=True, kw_only=True)
class OnModel:
    """What all that put a dictionary into a model are asked for."""

    model: str | None = None
    """Directory, .gguf, package:// or hub id; what the dictionary was trained on when absent."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the model; as in training when absent."""
    hook_point: str | None = None
    """Where the dictionary reads, if its files do not say so."""
    force: bool = False
    """Whether another model or place than the dictionary's is taken; the result names it."""
    read_out: Literal["linear", "refined"] = "linear"
    """How the dictionary's latents are read (`sae.read_out`)."""


@dataclass(frozen=True, kw_only=True)
class SteerRequest(SweepConfig, OnModel):
    """What `sae steer DICT` does beside the options that have names of their own."""

    latents: tuple[str, ...]
    """Each NUMBER=CHANGE: 10x (times its maximum), 0.5x norm, 4.5, +2x (added), *3, off."""
    neutral: str | None = None
    """A .txt or .jsonl file of text that has nothing to do with the latent; glosses when absent."""
    n_neutral: int = 16
    """Neutral texts."""
    sweep: bool = False
    """Whether many strengths are tried."""
    output: str | None = None
    """Directory of the results; `steer-NAME-LATENT` when absent."""
    targets: tuple[str, ...] = ()
    """Words of the model's text tower; the prompts are then files of pictures."""
    cache: str | None = None
    """Of pictures: the cache whose pixels are made alike; as the model's files say when absent."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require(bool(self.latents), "latents", "name at least one", self.latents)
        is_one = not self.sweep or len(self.latents) == 1
        require(is_one, "latents", "be one to sweep", self.latents)
        at_least("n_neutral", self.n_neutral, 1)
        of_texts = ("chat", "max_new_tokens", "positions", "first_position", "sweep")
        unread: dict[str, tuple[str, ...]] = (
            {"texts": of_texts} if self.targets else {"targets": ("cache",)}
        )
        if not self.sweep:
            of_sweep = ("strengths", "unit", "mode", "max_kl", "seed", "neutral", "n_neutral")
            unread["--sweep"] = (*of_sweep, "output")
        for beside, names in unread.items():
            _refuse_unread(self, names, beside)
        for text in self.latents:
            latent_change(text)


_LOADED = ("model", "dtype", "hook_point", "read_out", "first_position", "cache")
_READ_BY = {
    "pos": ("where", *_LOADED),
    "near": ("among",),
    "prompt": ("target", "against", "n_ablated", "baselines", *_LOADED),
}
"""What each way of finding latents reads, beside what all of them do."""


def _refuse_unread(config: Any, names: Sequence[str], beside: str) -> None:
    """Refuse what is set, though nothing would read it."""
    defaults = {entry.name: entry.default for entry in fields(config)}
    for name in names:
        value = getattr(config, name)
        require(value == defaults[name], name, f"stand beside {beside}, which reads it", value)


@dataclass(frozen=True, kw_only=True)
class FindRequest(OnModel):
    """What `sae find DICT` looks for: one of `pos`, `near`, and `prompt` with `target`."""

    pos: tuple[str, ...] = ()
    """Texts, or files of pictures, in each of which the latents fire."""
    neg: tuple[str, ...] = ()
    """Those in none of which they fire."""
    where: Literal["any", "last"] = "any"
    """On which token of a text."""
    near: int | None = None
    """Latents with directions like this one's."""
    among: str | None = None
    """The dictionary whose latents are compared with it; the same when absent."""
    prompt: str | None = None
    """Text whose next token is explained, or the file of a picture."""
    target: str | None = None
    """The token whose logit is explained; for a picture a word of the model's text tower."""
    against: str | None = None
    """A token, or word, whose logit is taken off."""
    cache: str | None = None
    """Of pictures: the cache whose pixels are made alike; as the model's files say when absent."""
    n: int = 10
    """Latents that are shown."""
    n_ablated: int = 64
    """Latents that are ablated to see how far attribution can be trusted."""
    baselines: tuple[Literal["off", "zero", "mean", "sampled"], ...] = ("off",)
    """Where integrated gradients begin (`sae.steer.paths`); the last two read neutral texts."""
    first_position: int = 1
    """Positions below this one, the attention sinks, do not count."""

    def __post_init__(self) -> None:
        """Check that one thing is asked for."""
        asked = [n for n in ("pos", "near", "prompt") if getattr(self, n) not in {None, ()}]
        require(len(asked) == 1, "pos", "be given, or near, or prompt: one of them", asked)
        require(bool(self.pos) or not self.neg, "neg", "stand beside pos", self.neg)
        given = self.prompt is None or self.target is not None
        require(given, "target", "name the token that is explained", self.target)
        distinct = bool(self.baselines) and len(set(self.baselines)) == len(self.baselines)
        require(distinct, "baselines", "name at least one, each once", self.baselines)
        for way, names in _READ_BY.items():
            if way != asked[0]:
                _refuse_unread(self, [n for n in names if n not in _READ_BY[asked[0]]], way)
        all_at_least(self, n=1, n_ablated=1)
        at_least("first_position", self.first_position, 0)


@dataclass(frozen=True, kw_only=True)
class SteerWordsRequest(_Prompts, OnModel):
    """What `sae steer DICT --word WORD` does: steer all latents whose labels name a word."""

    words: tuple[str, ...]
    """What the latents are about."""
    amplify: str | float | None = None
    """Added to each of them where it fires: 1x (of its maximum), or a plain activation."""
    calibrate: str | float | None = None
    """What each is drawn towards where it is below, at an unchanged norm of the stream."""
    by: Literal["information", "weights"] = "information"
    """Labels from the corpus (latents.parquet), or from weights (`explain.weights`)."""
    explained: str | None = None
    """Directory of the labels; `explain` in the dictionary's, or the run's, when absent."""
    n_latents: int = 8
    """Latents at most, those first that tell most about the words."""
    controls: int = 3
    """Sets of as many random latents that fire as often and as strongly."""
    neutral: str | None = None
    """A .txt or .jsonl file of text that has nothing to do with the words; glosses when absent."""
    n_neutral: int = 8
    """Neutral texts."""
    seed: int = 0
    """Of the random latents."""
    output: str | None = None
    """Directory of the figures, if they are to be written."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        given = [name for name in ("amplify", "calibrate") if getattr(self, name) is not None]
        require(len(given) == 1, "amplify", "be given, or calibrate: one of them", given)
        amount = strength(given[0], getattr(self, given[0]))
        in_max = amount.unit != "norm"
        require(in_max, given[0], "be a number, or one in units of max such as 1x", amount)
        is_target = given[0] == "amplify" or amount.value > 0
        require(is_target, "calibrate", "be above 0", amount.value)
        filled = bool(self.words) and all(word.strip() for word in self.words)
        require(filled, "words", "name at least one, none of them empty", self.words)
        all_at_least(self, n_latents=1, n_neutral=1, controls=0, seed=0)

    @property
    def change(self) -> tuple[str, str]:
        """Which change, and how much of it."""
        name = "calibrate" if self.amplify is None else "amplify"
        return name, str(getattr(self, name))


def latent_change(text: str) -> tuple[int, dict[str, Any]]:
    """Read NUMBER=CHANGE as the number of a latent and the words that `Edit` takes.

    Raises:
        ValueError: If it has another form.
    """
    number, equals, change = (part.strip() for part in text.partition("="))
    rule = "have the form NUMBER=CHANGE such as 123=10x, 123=+2x, 123=*3 or 123=off"
    require(number.isdecimal() and bool(equals), "latents", rule, text)
    if change == "off":
        return int(number), {"ablate": True}
    if change.startswith("*"):
        found = strength("latents", change[1:])
        require(found.unit == "absolute", "latents", "scale by a plain number", text)
        return int(number), {"scale": found.value}
    word = "add" if change.startswith("+") else "clamp"
    strength("latents", change := change.removeprefix("+"))
    return int(number), {word: change}
