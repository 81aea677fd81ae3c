"""How dictionaries are trained, as frozen configs; no torch here."""

import re
from dataclasses import dataclass
from typing import Literal, assert_never

from activations_cache.checks import at_least, fraction, positive, require
from sae.architecture import Activation, BatchTopK, JumpReLU, ReLU, SAEConfig, TopK


@dataclass(frozen=True, kw_only=True)
class L1:
    """Penalty sum_i a_i ||W_dec[i]|| beside the squared error summed over d."""

    coefficient: float = 5.0
    """Weight of the penalty, when E||u||^2 = d_in (Scaling Monosemanticity uses 5)."""
    ramp: float = 0.05
    """Fraction of the steps over which the weight rises from 0."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("coefficient", self.coefficient, 0)
        fraction("ramp", self.ramp)


@dataclass(frozen=True, kw_only=True)
class L0:
    """Penalty on the number of latents that fire, which moves JumpReLU's thresholds.

    With a target it is (L0 / target - 1)^2 of the batch's mean L0, which finds that L0 at any
    coefficient that is large enough; without, it is the L0 itself (arXiv 2407.14435).
    """

    coefficient: float = 1.0
    """Weight of the penalty, when E||u||^2 = d_in; without a target, small values belong here."""
    target: float | None = None
    """The L0 that is wanted."""
    ramp: float = 0.05
    """Fraction of the steps over which the weight rises from 0."""
    threshold_lr: float | None = None
    """Learning rate of the thresholds; the optimiser's when absent."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("coefficient", self.coefficient, 0)
        fraction("ramp", self.ramp)
        for name in ("target", "threshold_lr"):
            if (value := getattr(self, name)) is not None:
                positive(name, value)


@dataclass(frozen=True, kw_only=True)
class AuxK:
    """Dead latents reconstruct the residual (Gao et al. 2024, arXiv 2406.04093, A.2)."""

    coefficient: float = 1 / 32
    """Weight of the dead latents' squared error."""
    k: int | None = None
    """Dead latents that may fire in one row; half of d_in when absent."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("coefficient", self.coefficient, 0)
        if self.k is not None:
            at_least("k", self.k, 1)


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam with warm-up and a linear decay to zero at the end."""

    lr: float = 1e-3
    """Learning rate between warm-up and decay."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    warmup: float = 0.02
    """Fraction of the steps over which the rate rises from 0."""
    decay: float = 0.2
    """Fraction of the steps, the last ones, over which the rate falls to 0."""
    clip: float | None = 1.0
    """Largest norm of all gradients together; no clipping when absent."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("lr", "eps"):
            positive(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        for name in ("warmup", "decay"):
            fraction(name, getattr(self, name))
        rule = f"be at most 1 - warmup={self.warmup}"
        require(self.warmup + self.decay <= 1, "decay", rule, self.decay)
        if self.clip is not None:
            positive("clip", self.clip)


_TOPK, _ADAM = TopK(), Adam()


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """One entry of `saes:`: its form, its losses, its optimiser."""

    d_sae: int
    """Number of latents."""
    activation: Activation = _TOPK
    """Which latents fire."""
    b_in: Literal["none", "b_dec"] = "b_dec"
    """What is subtracted before the encoder."""
    l1: L1 | None = None
    """Sparsity penalty; needed by relu, refused by the others."""
    l0: L0 | None = None
    """Sparsity penalty; needed by jumprelu, refused by the others."""
    auxk: AuxK | None = None
    """Care for dead latents."""
    dead_after_tokens: int = 100_000
    """A latent is dead when it was silent for so many rows."""
    decoder_norm: float = 1.0
    """Norm of the decoder rows at the start."""
    unit_norm: bool = True
    """Keep the decoder rows at norm 1 and take their parallel part out of the gradient."""
    frozen: Literal["none", "decoder"] = "none"
    """A frozen random decoder makes a baseline: only the encoder and the biases learn."""
    optimizer: Adam = _ADAM
    """The optimiser and its schedule."""

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        match self.activation:
            case TopK(k=k) | BatchTopK(k=k):
                self._require_losses(auxk=None)
                require(k <= self.d_sae, "activation.k", f"be at most d_sae={self.d_sae}", k)
            case ReLU():
                self._require_losses(l1=True)
            case JumpReLU():
                self._require_losses(l0=True)
            case _:
                assert_never(self.activation)
        rule = "be false beside l1, which has the decoder's norms in it"
        require(self.l1 is None or not self.unit_norm, "unit_norm", rule, self.unit_norm)
        at_least("d_sae", self.d_sae, 1)
        at_least("dead_after_tokens", self.dead_after_tokens, 1)
        positive("decoder_norm", self.decoder_norm)

    def _require_losses(self, **needed: bool | None) -> None:
        """Check that the losses fit the activation: True is needed, None allowed, else refused."""
        of = f"for activation.kind {self.activation.kind!r}"
        for name in ("l1", "l0", "auxk"):
            value, is_needed = getattr(self, name), needed.get(name, False)
            require(is_needed is not True or value is not None, name, f"be given {of}", value)
            require(is_needed is not False or value is None, name, f"be absent {of}", value)

    def architecture(self, d_in: int, input_scale: float) -> SAEConfig:
        """The autoencoder's own config, once the rows are known."""
        return SAEConfig(
            d_in=d_in,
            d_sae=self.d_sae,
            activation=self.activation,
            b_in=self.b_in,
            input_scale=input_scale,
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Dictionaries that are trained side by side in one pass over the same rows."""

    saes: dict[str, DictionaryConfig]
    """The dictionaries by name; a frozen baseline is one of them."""
    batch: int = 1024
    """Rows per step."""
    epochs: int = 1
    """Passes over the rows."""
    seed: int = 0
    """Decides the order of the rows and the first weights."""
    precision: Literal["fp32", "bf16", "auto"] = "auto"
    """Format of the encoder's and the dense products; auto: bf16 where the device has it."""
    checkpoint_seconds: float = 60.0
    """A checkpoint is written so often."""
    log_every: int = 20
    """Steps between two points of the training curves."""

    def __post_init__(self) -> None:
        """Check names and ranges."""
        require(len(self.saes) > 0, "saes", "name at least one dictionary", self.saes)
        for name in self.saes:
            is_name = re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None
            require(is_name, "saes", "have names of letters, digits, - and _", name)
        for name in ("batch", "epochs", "log_every"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        positive("checkpoint_seconds", self.checkpoint_seconds)
