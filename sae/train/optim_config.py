"""How weights begin and move: optimisers and their schedules, as frozen configs; no torch.

Schedules as plain functions of the step.
"""

import math
import random
from dataclasses import dataclass
from typing import ClassVar, Literal

from monosema.checks import at_least, fraction, positive, require
from sae.train.loss_config import Control, Refine


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    """What all optimisers share: the rate, its rise at the start, and clipping."""

    lr: float | Literal["auto"] = 1e-3
    """Learning rate after warm-up; auto, for Adam alone: by `automatic_rate`."""
    warmup: float = 0.02
    """Fraction of the steps over which the rate rises from 0."""
    clip: float | None = 1.0
    """Largest norm of all gradients together; no clipping when absent."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.lr != "auto":
            positive("lr", self.lr)
        rule = "be a number for this optimizer"
        require(self.lr != "auto" or isinstance(self, Adam), "lr", rule, self.lr)
        fraction("warmup", self.warmup)
        if self.clip is not None:
            positive("clip", self.clip)

    @property
    def first_lr(self) -> float:
        """What an optimiser is made with; TrainStep sets `auto` before each step."""
        return 0.0 if self.lr == "auto" else self.lr


@dataclass(frozen=True, kw_only=True)
class _Decaying(_Schedule):
    """The same, and the rate falls at the end; with `decay: 0` it is constant."""

    decay: float = 0.2
    """Fraction of the steps, the last ones, over which the rate falls to 0; at 0 it stays."""
    decay_shape: Literal["linear", "cosine"] = "linear"
    """How it falls."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        fraction("decay", self.decay)
        rule = f"be at most 1 - warmup={self.warmup}"
        require(self.warmup + self.decay <= 1, "decay", rule, self.decay)


@dataclass(frozen=True, kw_only=True)
class Adam(_Decaying):
    """Adam (Kingma and Ba 2015); what is meant where no kind is given."""

    IMPLIED: ClassVar[bool] = True

    kind: Literal["adam"] = "adam"
    """Tells the optimisers apart."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    states: Literal["float32", "bfloat16", "int8"] = "float32"
    """Format of both moments of the matrices: 8, 4 or about 2 bytes a weight."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        positive("eps", self.eps)
        for name in ("beta1", "beta2"):
            decay(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Muon(_Decaying):
    """Momentum, orthogonalised matrix by matrix (Jordan et al. 2024); Adam for the vectors.

    Updates are scaled to the size of Adam's (Liu et al., arXiv 2502.16982), so rates are of the
    same order; on planted sparse data about three times Adam's was best.
    """

    kind: Literal["muon"] = "muon"
    """Tells the optimisers apart."""
    momentum: float = 0.95
    """Decay of the momentum, which is Nesterov's."""
    newton_schulz: int = 5
    """Iterations of the orthogonalisation."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        decay("momentum", self.momentum)
        at_least("newton_schulz", self.newton_schulz, 1)


@dataclass(frozen=True, kw_only=True)
class ScheduleFree(_Schedule):
    """Schedule-free Adam: averaging takes the place of a decay (Defazio et al., arXiv 2405.15682).

    Gradients are taken between the newest and the averaged weights; the averaged ones are saved.
    """

    kind: Literal["schedule_free"] = "schedule_free"
    """Tells the optimisers apart."""
    beta1: float = 0.9
    """Where between the newest (0) and the averaged (1) weights gradients are taken."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        positive("eps", self.eps)
        for name in ("beta1", "beta2"):
            decay(name, getattr(self, name))


Optimizer = Adam | Muon | ScheduleFree


@dataclass(frozen=True, kw_only=True)
class Resample:
    """Dead latents begin again from rows that are reconstructed badly (Bricken et al. 2023).

    A row is drawn with a probability in proportion to its squared loss; the decoder gets its
    direction, the encoder the same at a fifth of the living latents' mean norm, the biases 0, and
    the optimiser forgets what it knew of the latent.
    """

    n: int = 4
    """How often."""
    until: float = 0.5
    """Fraction of the steps at which it is done for the last time; the others lie evenly before."""
    encoder_norm: float = 0.2
    """Norm of the new encoder rows, in units of the living ones' mean."""
    seed: int = 0
    """Decides, with the number of the step, what is drawn."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("n", self.n, 1)
        fraction("until", self.until)
        positive("until", self.until)
        positive("encoder_norm", self.encoder_norm)
        at_least("seed", self.seed, 0)


def decay(name: str, value: float) -> None:
    """Require a decay: at least 0 and below 1."""
    require(0 <= value < 1, name, "be at least 0 and below 1", value)


@dataclass(frozen=True, kw_only=True)
class _Initial:
    """What all ways to begin share: the bias, and the length of the rows."""

    bias: Literal["mean", "median"] = "mean"
    """Where b_dec begins: the rows' mean, or their geometric median, which outliers hardly move."""
    norms: tuple[float, ...] = ()
    """Norms of the first rows that are tried: that of least error takes decoder_norm's place."""
    n_rows: int = 4096
    """Rows of the cache that a median and norms are found on, drawn by the seed."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for norm in self.norms:
            positive("norms", norm)
        require(len({*self.norms}) == len(self.norms), "norms", "name each once", self.norms)
        at_least("n_rows", self.n_rows, 1)


@dataclass(frozen=True, kw_only=True)
class Tied(_Initial):
    """Random decoder directions, the encoder their transpose; what is meant without a kind."""

    IMPLIED: ClassVar[bool] = True

    kind: Literal["tied"] = "tied"
    """Tells the ways to begin apart."""


@dataclass(frozen=True, kw_only=True)
class DataPoints(_Initial):
    """Decoder directions of rows of the cache less the bias, the encoder their transpose.

    One row for each latent, drawn by the seed. Where there are fewer that differ, the other
    latents are random. Rows that are predicted from others give the decoder, those that are read
    the encoder. A row of k features has a cosine of 1 / sqrt(k) with each of them, a random
    direction one of 1 / sqrt(d_in): so wide rows are learned in far fewer steps.
    """

    kind: Literal["data_points"] = "data_points"
    """Tells the ways to begin apart."""
    norms: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
    """As above; latents that begin at rows overlap, so at the norm 1 they would overshoot."""
    whiten: bool = True
    """Give the rows the same variance in every direction first: rows of a model share a few
    directions, and without this all latents would lie along those."""


Init = Tied | DataPoints


@dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """Contexts of the cache are read once more, and the model goes on from the reconstruction."""

    n_rows: int
    """Rows of this part of the training, at least."""
    lr: float = 1e-4
    """Learning rate of its own Adam, which falls to 0."""
    coefficient: float | None = None
    """Weight of the KL of the predictions; by default it is as large as the loss on rows."""
    contexts: int = 4
    """Contexts per step."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("n_rows", self.n_rows, 1)
        at_least("contexts", self.contexts, 1)
        positive("lr", self.lr)
        if self.coefficient is not None:
            positive("coefficient", self.coefficient)


def ramp(step: int, total_steps: int, fraction: float) -> float:
    """Rise linearly from 1/n to 1 over the first `fraction` of the steps, n of them, then stay."""
    n = round(fraction * total_steps)
    return 1.0 if step + 1 >= n else (step + 1) / n


def warmup_decay(
    step: int,
    total_steps: int,
    warmup: float,
    decay: float,
    shape: Literal["linear", "cosine"] = "linear",
) -> float:
    """Rise over the first `warmup` of the steps, fall over the last `decay` of them.

    A linear fall of n steps ends with the factor 1/n: no step is wasted at zero.
    """
    n = round(decay * total_steps)
    left = total_steps - step
    fall = 1.0 if left > n else max(left, 0) / n
    if shape == "cosine" and left <= n:
        fall = (1 - math.cos(math.pi * max(left, 0) / n)) / 2
    return ramp(step, total_steps, warmup) * fall


def rate_factor(settings: Optimizer, step: int, total_steps: int) -> float:
    """What the learning rates are multiplied by at a step."""
    if isinstance(settings, ScheduleFree):
        return ramp(step, total_steps, settings.warmup)
    at = (step, total_steps)
    return warmup_decay(*at, settings.warmup, settings.decay, settings.decay_shape)


SHORT, FEW = 2000, 4 / 9
"""Steps up to which the learning rate `auto` does not depend on their number; rows of a step over
latents, down to which it falls with their square root, and beyond with the fourth."""


def automatic_rate(
    d_sae: int, d_in: int, n_rows: int, total_steps: int, *, starts_dense: bool = False
) -> float:
    """The learning rate `auto`: 0.01 times three factors, each of them 1 at most.

    sqrt(rows of a step / latents), 10 / sqrt(d_in) and sqrt(2000 / steps). A step of Adam has the
    norm lr sqrt(d_in), a decoder row the norm 1: so wide rows get a lower rate, or the first steps
    throw latents to where no row reaches them. The noise of N steps adds up to lr sqrt(N): so long
    runs get a lower rate. Short ones get no higher one, since it is the first steps that throw.
    Under a controller d_in latents fire at first, few of them out of reach of the rows: there the
    smaller one of the first two factors is enough.
    The fall with the width is Gao et al.'s (arXiv 2406.04093, A.3), and half as steep from 9 / 4
    latents a row on, as was measured (docs, ground_truth_notebook). The scale of the input is not
    in it: rows reach the step in the dictionary's units, where their mean square norm is d_in
    whatever the model's is, and Adam's steps do not depend on the scale of the loss.

    Args:
        d_sae: Latents of the whole dictionary.
        d_in: Width of the rows that are read.
        n_rows: Rows of a step, over all processes.
        total_steps: Length of the run.
        starts_dense: Whether a controller lets the L0 fall from d_in.
    """
    ratio = n_rows / d_sae
    wide = min(1.0, ratio**0.5) if ratio >= FEW else FEW**0.5 * (ratio / FEW) ** 0.25
    reached, short = min(1.0, 10 / d_in**0.5), min(1.0, (SHORT / total_steps) ** 0.5)
    return 0.01 * (min(wide, reached) if starts_dense else wide * reached) * short


def travel_rate(fires: float, total_steps: int) -> float:
    """The least rate of what keeps latents shut, where an L0 is aimed at.

    All steps together go twice as far as `fires`, a single one a hundredth of it at most. Rows of
    norm sqrt(d_in) that k latents make up have h of about sqrt(d_in / k) where these fire: 2.8 with
    8 in 64 dimensions, 23 in 4,096. There 1,000 steps of .01 leave 13 latents where 8 are wanted,
    and a controller silences by shortening all weights what biases do not shut in time.
    """
    return min(2 / total_steps, 0.01) * fires


def is_refined(settings: Refine, step: int, total_steps: int) -> bool:
    """Whether refining is over, and the encoder learns to do without."""
    return step >= round(settings.until * total_steps)


def holds_decoder(settings: Refine, step: int, total_steps: int) -> bool:
    """Whether the decoder stands still at a step: after refining, until it learns again."""
    over = step >= round(settings.held_until * total_steps)
    return is_refined(settings, step, total_steps) and not over


def slack_now(settings: Refine | None, step: int, total_steps: int) -> float:
    """What k is multiplied by at a step."""
    if settings is None or is_refined(settings, step, total_steps):
        return 1.0
    return settings.slack if step >= round(settings.slack_from * total_steps) else 1.0


def first_target(settings: Control, d_in: int, d_sae: int) -> float:
    """The L0 that a controller aims at first."""
    first = min(d_in, d_sae / 4) if settings.first is None else settings.first
    return float(max(settings.target, first))


def target_now(settings: Control, first: float, step: int, total_steps: int) -> float:
    """The L0 that a controller aims at: it falls geometrically."""
    left = max(0.0, 1 - step / (settings.until * total_steps))
    return settings.target * (first / settings.target) ** left


def falling_k(step: int, total_steps: int, start: int, end: int, fraction: float) -> int:
    """Go linearly from start to end over the first `fraction` of the steps, then stay."""
    n = round(fraction * total_steps)
    return end if step >= n else end + round((start - end) * (n - step) / n)


def falling_p(step: int, total_steps: int, end: float, n: int, start: float) -> float:
    """Stay at 1 for the fraction `start` of the steps, then reach end in n equal jumps."""
    first = round(start * total_steps)
    if step < first:
        return 1.0
    jumps = min(n, 1 + (step - first) * n // max(total_steps - first, 1))
    return 1 - (1 - end) * jumps / n


def random_prefixes(step: int, seed: int, n: int, d_sae: int, exponent: float) -> tuple[int, ...]:
    """Draw n sizes with the density m^-(1 + exponent) on 1..d_sae; the same for the same step.

    They rise, each stands there once, and d_sae is the last of them.
    """
    draw = random.Random(f"prefixes {seed} {step}")
    left = 1 - (d_sae + 1) ** -exponent  # the density from 1 to d_sae + 1, sizes being rounded down
    sizes = {int((1 - draw.random() * left) ** (-1 / exponent)) for _ in range(n)}
    return tuple(sorted({min(size, d_sae) for size in sizes} | {d_sae}))
