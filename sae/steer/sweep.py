"""What a latent does to a model from strength to strength, beside a random direction.

A sweep as one picture: what is gained and what it costs, strength by strength.
"""

import contextlib
import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from io import BytesIO, StringIO
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from activations_cache import io
from activations_cache.checks import Progress, silent
from activations_cache.hooks import capture
from activations_cache.models import Tokenizer
from sae import notebook
from sae.autoencoder import SparseAutoencoder
from sae.steer.attribution import random_direction
from sae.steer.config import SweepConfig
from sae.steer.edits import Edit
from sae.steer.generation import MAX_REPEATED, Effect, Generation, Steered, generate, measure_effect
from sae.steer.steering import Steering

TAU = 0.1
"""Another latent counts as moved where it changes by more than this share of its maximum."""

LATENT, RANDOM = "latent", "random direction"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One strength of one arm; means over the prompts and over the tokens of the neutral text."""

    arm: str
    """`latent`, or `random direction` of equal norm, moved by as much at each token."""
    strength: float
    """In the unit of the sweep."""
    target_gain: float
    """Rise of log p(target tokens) over the places of the base text, in nats."""
    target_share: float
    """Share of the steered text's tokens that are target tokens."""
    kl_neutral: float
    """KL(model as it is || steered) on neutral text, in nats per token."""
    top1_agreement: float
    """Share of the neutral text's tokens after which both hold the same token most likely."""
    perplexity: float
    """Of the steered text under the model as it is."""
    repeated: float
    """Share of the steered text's 3-grams that occur earlier in it."""
    is_loop: bool
    """Whether that is more than MAX_REPEATED."""
    n_moved: float
    """Other latents per neutral token that changed by more than TAU of their maximum."""
    read_back: float
    """What the dictionary reads of the latent in the steered stream; a clamp to 5 is not read as 5.
    """
    n_tokens: int
    """Tokens on which the edit ran."""
    text: str
    """Continuation of the first prompt."""

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of a table with the headings `CELLS`."""
        return (
            self.arm,
            f"{self.strength:g}",
            f"{self.target_gain:+.2f}",
            f"{self.kl_neutral:.3f}",
            f"{self.top1_agreement:.2f}",
            f"{self.perplexity:.1f}",
            f"{self.repeated:.2f}{' loop' if self.is_loop else ''}",
            f"{self.n_moved:.1f}",
        )


CELLS = ("arm", "strength", "gain", "KL", "top-1", "perplexity", "repeated", "moved")
"""What the cells of a point are."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All strengths of all arms, and which strength is the largest that may be taken."""

    points: tuple[Point, ...]
    """Arm after arm, strengths ascending."""
    max_kl: float
    """The bound on kl_neutral."""
    perplexity_base: float
    """Of the base texts."""
    base: str
    """The first prompt's continuation as it is."""

    def of_arm(self, arm: str) -> list[Point]:
        """The points of one arm."""
        return [point for point in self.points if point.arm == arm]

    @property
    def best(self) -> Point | None:
        """The largest strength by size with kl_neutral <= max_kl; of two as large the positive."""
        within = [p for p in self.of_arm(LATENT) if p.kl_neutral <= self.max_kl]
        return max(within, key=lambda p: (abs(p.strength), p.strength), default=None)

    @property
    def verdict(self) -> str:
        """The strength that is chosen, with what the model writes at it."""
        best = self.best
        if best is None:
            return f"no strength keeps KL within {self.max_kl:g}"
        return (
            f"the largest strength with KL <= {self.max_kl:g} is {best.strength:g}"
            f"{', which loops' if best.is_loop else ''}: {best.text!r} (base: {self.base!r})"
        )

    def _repr_html_(self) -> str:
        return notebook.table("", CELLS, [point.cells for point in self.points], self.verdict)

    def write_csv(self, path: Path) -> None:
        """Write a row for each point."""
        text = StringIO(newline="")
        writer = csv.DictWriter(text, [field.name for field in fields(Point)])
        writer.writeheader()
        writer.writerows(asdict(point) for point in self.points)
        io.write_files({path: text.getvalue().encode()})


class Target(NamedTuple):
    """What is swept."""

    model: nn.Module
    """A causal language model in evaluation mode."""
    tokenizer: Tokenizer
    """The model's."""
    dictionary: SparseAutoencoder
    """With statistics if strengths are in units of a maximum."""
    latent: int
    """Number of the latent."""
    tokens: Int[Tensor, " k"]
    """Tokens that it stands for, such as those that its direction promotes."""


def sweep(
    target: Target,
    neutral: Int[Tensor, "example pos"],
    config: SweepConfig,
    *,
    progress: Progress | None = None,
) -> Sweep:
    """Steer by one latent and by a random direction of equal norm, at each strength.

    Args:
        target: Model, dictionary and latent.
        neutral: Token ids of text that has nothing to do with the latent; -1 where one is short.
        config: Strengths, prompts, bound.
        progress: Called after each strength of each arm.
    """
    progress = progress or silent
    made = target.dictionary.direction(target.latent)
    control = random_direction(made, torch.Generator().manual_seed(config.seed))
    arms = {LATENT: None, RANDOM: control.to(made)}
    bases = [_continued(target, prompt, config) for prompt in config.prompts]
    side = _Neutral(target, neutral)
    points: list[Point] = []
    for arm, along in arms.items():
        for strength in sorted(config.strengths):
            points.append(_point(target, side, bases, config, (arm, strength, along)))
            progress(len(points), len(arms) * len(config.strengths), "strengths")
    nothing = _effects(target, contextlib.nullcontext, bases, bases)
    return Sweep(
        points=tuple(points),
        max_kl=config.max_kl,
        perplexity_base=math.exp(_mean([effect.nll for effect in nothing])),
        base=bases[0].text,
    )


def _continued(target: Target, prompt: str, config: SweepConfig) -> Generation:
    options = {"max_new_tokens": config.max_new_tokens, "chat": config.chat}
    return generate(target.model, target.tokenizer, prompt, **options)


def _point(
    target: Target,
    side: "_Neutral",
    bases: list[Generation],
    config: SweepConfig,
    cell: tuple[str, float, Tensor | None],
) -> Point:
    arm, strength, along = cell
    text = f"{strength!r}x {config.unit}"
    clamp, add = (text, None) if config.mode == "clamp" else (None, text)
    edit = Edit(target.dictionary, latent=target.latent, clamp=clamp, add=add, along=along)

    def steered() -> Steering:
        where = {"positions": config.positions, "first_position": config.first_position}
        return Steering(target.model, [edit], **where)

    with steered() as steering:
        changed = [_continued(target, prompt, config) for prompt in config.prompts]
    result = _effects(target, steered, bases, changed)
    repeated = _mean([effect.repeated for effect in result])
    with steered():
        effect = side.measure()
    return Point(
        arm=arm,
        strength=float(strength),
        target_gain=_mean([effect.target_gain for effect in result]),
        target_share=_mean([effect.target_share for effect in result]),
        perplexity=math.exp(_mean([effect.nll for effect in result])),
        repeated=repeated,
        is_loop=repeated > MAX_REPEATED,
        n_tokens=steering.n_tokens,
        text=changed[0].text,
        **effect,
    )


def _effects(
    target: Target, steered: Steered, bases: list[Generation], changed: list[Generation]
) -> list[Effect]:
    pairs = zip(bases, changed, strict=True)
    return [measure_effect(target.model, steered, b, c, target.tokens) for b, c in pairs]


def _mean(figures: Sequence[float]) -> float:
    return sum(figures) / len(figures)


class _Neutral:
    """Neutral text, and what the model as it is makes of it."""

    def __init__(self, target: Target, tokens: Int[Tensor, "example pos"]) -> None:
        device = next(target.model.parameters()).device
        self._target = target
        self._ids = tokens.clamp_min(0).to(device)
        self._mask = (tokens >= 0).to(device)
        self._log_p, self._f = self._run()
        stats = target.dictionary.stats
        top = self._f.amax(dim=0) if stats is None else stats.max_activation.to(self._f)
        self._tau = (TAU * top).clamp_min(torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Figures of the model as it is now, beside those of before."""
        log_q, f = self._run()
        latent = self._target.latent
        kl = (self._log_p.exp() * (self._log_p - log_q)).sum(dim=1)
        moved = (f - self._f).abs() > self._tau
        moved[:, latent] = False
        return {
            "kl_neutral": float(kl.mean()),
            "top1_agreement": float((self._log_p.argmax(1) == log_q.argmax(1)).float().mean()),
            "n_moved": float(moved.sum(dim=1).float().mean()),
            "read_back": float(f[:, latent].mean()),
        }

    @torch.no_grad()
    def _run(self) -> tuple[Float[Tensor, "row vocab"], Float[Tensor, "row d_sae"]]:
        """Log-probabilities and latents after each token but the first of each text."""
        placed, where = self._target.dictionary, self._rows()
        arguments = {"attention_mask": self._mask.long(), "use_cache": False}
        logits = self._target.model(input_ids=self._ids, **arguments).logits[where]
        with capture(self._target.model, [placed.hook_point]) as run:
            rows = run(self._ids, **arguments)[placed.hook_point][where]
        return logits.float().log_softmax(dim=1), placed.encode_dense(rows.float())

    def _rows(self) -> Bool[Tensor, "example pos"]:
        where = self._mask.clone()
        where[:, 0] = False  # an attention sink, which is not steered
        return where


PANELS: tuple[tuple[str, Callable[[Point], float]], ...] = (
    ("gain in log p(target tokens), nats", lambda point: point.target_gain),
    ("KL on neutral text, nats per token", lambda point: point.kl_neutral),
    ("perplexity of the steered text", lambda point: point.perplexity),
    ("repeated 3-grams, share (loops)", lambda point: point.repeated),
    (f"other latents moved by > {TAU:g} max, per token", lambda point: point.n_moved),
    ("top-1 agreement on neutral text", lambda point: point.top1_agreement),
)
COLOURS = {LATENT: "#c0392b", RANDOM: "#7f8c8d"}


def plot(result: Sweep, title: str, unit: str) -> bytes:
    """Return a PNG of six panels over the strengths, with the bound and the strength that keeps it.

    Args:
        result: The sweep.
        title: Heading.
        unit: What strengths are counted in.
    """
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for axis, (name, value) in zip(axes, PANELS, strict=True):
        for arm, colour in COLOURS.items():
            points = result.of_arm(arm)
            strengths = [point.strength for point in points]
            axis.plot(strengths, [value(p) for p in points], "o-", ms=4, color=colour, label=arm)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(f"strength, {unit}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        if result.best is not None:
            axis.axvline(result.best.strength, color="#2980b9", lw=0.8, ls="--")
    _level(axes[1], result.max_kl, "bound")
    _level(axes[2], result.perplexity_base, "base text")
    _level(axes[3], MAX_REPEATED, "loop")
    axes[1].set_yscale("symlog", linthresh=0.1)
    axes[1].set_ylim(bottom=0)
    axes[2].set_yscale("log")
    for formatter in (axes[2].yaxis.set_major_formatter, axes[2].yaxis.set_minor_formatter):
        formatter("{x:g}")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _level(axis: Axes, value: float, name: str) -> None:
    axis.axhline(value, color="black", lw=0.7, ls=":")
    axis.annotate(
        name, (1, value), xycoords=("axes fraction", "data"), fontsize=8, ha="right", va="bottom"
    )
