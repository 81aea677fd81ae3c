"""The terms of the loss and what anneals them, as frozen configs; no torch here."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from monosema.checks import at_least, fraction, positive, require
from sae.train.loss_term import LossFacts, Sizes, Term

DENSE_OF_DEAD = 2.0
"""Matrices (batch, dead) that AuxK holds at once."""
STIFF = 4.0
"""Weight of the L0 penalty beside a target, in units of d_in."""


@dataclass(frozen=True, kw_only=True)
class L1(Term):
    """Penalty sum_i a_i ||W_dec[i]|| beside the squared error summed over d.

    For a gated dictionary a_i is max(h_i, 0) of the gates, and beside it stands the error of what
    these reconstruct with the decoder held still (arXiv 2404.16014).
    """

    coefficient: float = 5.0
    """Weight of the penalty, when E||u||^2 = d_in (Scaling Monosemanticity uses 5)."""
    ramp: float = 0.05
    """Fraction of the steps over which the weight rises from 0."""

    facts: ClassVar = LossFacts(trains=("dense", "gated"), thresholds=("none",), is_penalty=True)

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("coefficient", self.coefficient, 0)
        fraction("ramp", self.ramp)


@dataclass(frozen=True, kw_only=True)
class PAnneal(Term):
    """Penalty sum_i (a_i ||W_dec[i]||)^p, p falling from 1 (Karvonen et al., arXiv 2408.00113).

    p falls in a few jumps; at each, the weight is multiplied by what keeps the penalty of that
    batch as large as it was.
    """

    coefficient: float = 5.0
    """Weight of the penalty while p is 1, when E||u||^2 = d_in."""
    ramp: float = 0.05
    """Fraction of the steps over which the weight rises from 0."""
    p: float = 0.2
    """p at the end."""
    start: float = 0.2
    """Fraction of the steps after which p begins to fall."""
    n: int = 10
    """Number of jumps."""

    facts: ClassVar = LossFacts(
        trains=("dense",),
        thresholds=("none",),
        is_penalty=True,
        in_one_op=False,
        is_sharded=False,
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("coefficient", self.coefficient, 0)
        require(0 < self.p <= 1, "p", "be above 0 and at most 1", self.p)
        fraction("ramp", self.ramp)
        fraction("start", self.start)
        at_least("n", self.n, 1)

    @property
    def whole_batch(self) -> str | None:
        """P falls by what the whole batch's penalty is."""
        return ""


@dataclass(frozen=True, kw_only=True)
class L0(Term):
    """Penalty on the number of latents that fire, which moves JumpReLU's thresholds.

    With a target it is (L0 / target - 1)^2 of the batch's mean L0, which finds that L0 at any
    coefficient that is large enough; without, it is the L0 itself (arXiv 2407.14435).
    """

    coefficient: float | None = None
    """Weight of the penalty, when E||u||^2 = d_in; if absent 1, or beside a target STIFF d_in."""
    target: float | None = None
    """The L0 that is wanted."""
    ramp: float = 0.05
    """Fraction of the steps over which the weight rises from 0."""
    threshold_lr: float | None = None
    """Learning rate of the thresholds; the optimiser's when absent."""

    facts: ClassVar = LossFacts(trains=("dense",), thresholds=("per latent",), is_penalty=True)

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.coefficient is not None:
            at_least("coefficient", self.coefficient, 0)
        fraction("ramp", self.ramp)
        for name in ("target", "threshold_lr"):
            if (value := getattr(self, name)) is not None:
                positive(name, value)

    def weight(self, d_in: int) -> float:
        """The coefficient, for rows of this width.

        What the last activation takes off the squared error is some .1 d_in / target (docs,
        ground_truth_notebook), and the penalty's slope is 2 weight (L0 / target - 1) / target. Both
        are equal where L0 is 1.3 % above the target, at 4 d_in.
        """
        if self.coefficient is not None:
            return self.coefficient
        return 1.0 if self.target is None else STIFF * d_in

    @property
    def whole_batch(self) -> str | None:
        """The target is that of the whole batch."""
        return None if self.target is None else ".target"


@dataclass(frozen=True, kw_only=True)
class Tanh(Term):
    """Penalty sum_i tanh(scale a_i ||W_dec[i]||), an L0 that all weights learn from.

    Anthropic, Circuits Updates, January 2025.
    """

    coefficient: float = 10.0
    """Weight of the penalty, when E||u||^2 = d_in."""
    scale: float = 4.0
    """How steeply a latent's penalty goes from 0 to 1."""
    ramp: float = 1.0
    """Fraction of the steps over which the weight rises from 0."""
    threshold_lr: float | None = None
    """Learning rate of the thresholds; the optimiser's when absent."""

    facts: ClassVar = LossFacts(
        trains=("dense",),
        thresholds=("per latent",),
        is_penalty=True,
        in_one_op=False,
        is_sharded=False,
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("coefficient", self.coefficient, 0)
        positive("scale", self.scale)
        fraction("ramp", self.ramp)
        if self.threshold_lr is not None:
            positive("threshold_lr", self.threshold_lr)


@dataclass(frozen=True, kw_only=True)
class PreAct(Term):
    """Dead latents are drawn to their thresholds: sum_i max(threshold_i - h_i, 0) ||W_dec[i]||.

    Anthropic, Circuits Updates, January 2025.
    """

    coefficient: float = 3e-6
    """Weight of the sum over the dead latents."""

    facts: ClassVar = LossFacts(
        trains=("dense",), thresholds=("per latent",), in_one_op=False, is_sharded=False
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("coefficient", self.coefficient, 0)


@dataclass(frozen=True, kw_only=True)
class AuxK(Term):
    """Dead latents reconstruct the residual (Gao et al. 2024, arXiv 2406.04093, A.2).

    Where nothing chooses the k largest, each step opens them too (`sae.train.weights.open_`):
    thresholds fall, the biases of ReLU and gates rise.
    """

    coefficient: float = 1 / 32
    """Weight of the dead latents' squared error."""
    k: int | None = None
    """Dead latents that may fire in one row; half of d_in when absent."""
    products: Literal["step", "bf16"] = "step"
    """Format of its dense products: that of the whole step, or bf16, which suffices to revive."""

    facts: ClassVar = LossFacts()

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("coefficient", self.coefficient, 0)
        if self.k is not None:
            at_least("k", self.k, 1)

    def memory(self, sizes: Sizes) -> float:
        """Dense matrices of the dead latents."""
        is_low = "bf16" in (sizes.precision, self.products)
        return DENSE_OF_DEAD * (0.5 if is_low else 1.0) * sizes.dead * sizes.dense


@dataclass(frozen=True, kw_only=True)
class MultiTopK(Term):
    """A second reconstruction from more latents (Gao et al. 2024, arXiv 2406.04093, 4.2)."""

    coefficient: float = 1 / 8
    """Weight of its squared error."""
    times: int = 4
    """It has so many times k latents."""

    facts: ClassVar = LossFacts(choices=("row",), is_sharded=False)

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("coefficient", self.coefficient, 0)
        at_least("times", self.times, 2)


@dataclass(frozen=True, kw_only=True)
class FixedPrefixes(Term):
    """Every prefix of the latents reconstructs the row (Bussmann et al. 2025, arXiv 2503.17547).

    The squared error is the mean over the prefixes, the whole dictionary being the last of them.
    """

    kind: Literal["fixed"] = "fixed"
    """Tells the choices of prefixes apart."""
    ends: tuple[int, ...]
    """Sizes of the prefixes, rising, all below d_sae."""
    until: float | None = None
    """Fraction of the steps over which the shorter ones' weight falls linearly to 0; if absent it
    stays."""

    facts: ClassVar = LossFacts(trains=("sparse", "dense"), in_one_op=False, is_sharded=False)

    def __post_init__(self) -> None:
        """Check that the prefixes rise."""
        if self.until is not None:
            positive("until", self.until)
            fraction("until", self.until)
        ends = (0, *self.ends)
        rises = all(low < high for low, high in pairwise(ends))
        require(len(ends) > 1 and rises, "ends", "rise from at least 1", self.ends)


@dataclass(frozen=True, kw_only=True)
class RandomPrefixes(Term):
    """The same for prefixes that are drawn anew at every step, short ones more often.

    Sizes m have the density m^-(1 + exponent) on 1..d_sae (Nabeshima, Matryoshka Sparse
    Autoencoders, 2024).
    """

    kind: Literal["random"] = "random"
    """Tells the choices of prefixes apart."""
    n: int = 9
    """Sizes that are drawn; equal ones count once, and the whole dictionary always joins them."""
    exponent: float = 0.5
    """How fast the density falls."""
    seed: int = 0
    """Decides, with the number of the step, what is drawn."""

    facts: ClassVar = LossFacts(trains=("sparse", "dense"), in_one_op=False, is_sharded=False)

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("n", self.n, 1)
        positive("exponent", self.exponent)
        at_least("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class NestedK(Term):
    """The same for the k largest latents of each row, for several k (Zaigrajew et al. 2025, MSAE).

    The activation's k is the last of them (arXiv 2502.20578).
    """

    kind: Literal["nested_k"] = "nested_k"
    """Tells the choices of latents apart."""
    ks: tuple[int, ...]
    """Rising, all below the activation's k."""
    weights: Literal["uniform", "reverse"] = "uniform"
    """Of n errors all count alike, or n for the smallest k, n - 1 for the next, down to 1."""

    facts: ClassVar = LossFacts(choices=("row",), is_sharded=False)

    def __post_init__(self) -> None:
        """Check that the numbers rise."""
        rises = all(low < high for low, high in pairwise((0, *self.ks)))
        require(len(self.ks) > 0 and rises, "ks", "rise from at least 1", self.ks)


Matryoshka = FixedPrefixes | RandomPrefixes | NestedK


@dataclass(frozen=True, kw_only=True)
class Control(Term):
    """A controller of the penalty's weight: after each step it is multiplied by exp(rate * e).

    e = L0 / T - 1 of that step's batch, cut at -1 and 1; so the weight rises while too many latents
    fire, whatever the coefficient that it starts from. T falls to the target while latents find
    their directions: those that a penalty silences before that are never found.
    """

    target: float
    """The L0 that is wanted."""
    rate: float = 0.02
    """How fast the weight moves; faster where T falls by more than a factor of 16, in proportion to
    the logarithm, so that L0 lags no more behind."""
    first: float | None = None
    """T at first; None: d_in, or a quarter of the latents if that is less. As many latents as
    dimensions reconstruct a row whatever their directions are."""
    until: float = 0.7
    """Fraction of the steps after which T is the target."""

    facts: ClassVar = LossFacts(trains=("dense", "gated"), is_sharded=False)

    def __post_init__(self) -> None:
        """Check ranges."""
        positive("target", self.target)
        positive("rate", self.rate)
        if self.first is not None:
            at_least("first", self.first, self.target)
        positive("until", self.until)
        fraction("until", self.until)

    @property
    def whole_batch(self) -> str | None:
        """The weight moves by the whole batch's L0."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Refine(Term):
    """A better encoding in training alone: what the latents leave of a row is added to it again.

    u' = u + rate (u - y(u)) + rate (u - y(u')) ..., and the losses are those of the latents of the
    last u'. It is an unrolled ISTA with one encoder for all rounds (LISTA, Gregor and LeCun 2010).
    The decoder learns from fewer wrong latents, and is then held still while the encoder learns to
    find them in one product; at the very end it may adapt to what that encoder finds.
    """

    steps: int = 2
    """How often the rest is added."""
    rate: float = 0.5
    """How much of it."""
    until: float = 0.7
    """Fraction of the steps after which rows are read as they are and the decoder is held."""
    held_until: float = 1.0
    """Fraction of the steps after which the decoder learns again; at `until` it is never held."""
    slack: float = 1.0
    """Times k latents fire from `slack_from` to `until`: at k itself two features that mostly fire
    together are cheaper as one latent."""
    slack_from: float = 0.4
    """Fraction of the steps after which there is slack."""

    facts: ClassVar = LossFacts(choices=("row", "batch"), is_sharded=False)

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("steps", self.steps, 1)
        at_least("slack", self.slack, 1)
        fraction("slack_from", self.slack_from)
        positive("rate", self.rate)
        fraction("until", self.until)
        fraction("held_until", self.held_until)
        rule = f"be at least until={self.until}"
        require(self.held_until >= self.until, "held_until", rule, self.held_until)

    def memory(self, sizes: Sizes) -> float:
        """A second gradient of the encoder while both are added up, and each round's rows."""
        return float(sizes.weights // 2 + self.steps * sizes.rows)


@dataclass(frozen=True, kw_only=True)
class KAnneal(Term):
    """k begins large and falls linearly to the one of the activation."""

    start: int
    """k at the first step."""
    until: float = 0.2
    """Fraction of the steps after which k is the activation's."""

    facts: ClassVar = LossFacts(choices=("row", "batch"))

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("start", self.start, 1)
        fraction("until", self.until)
