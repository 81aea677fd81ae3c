"""Losses of a batch, all in the dictionary's units: plain functions of tensors.

What a loss of the user's own is, and what it gets to see of a step.
"""

from typing import Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from sae.activations import Latents, to_dense, to_latents
from sae.autoencoder import SparseAutoencoder


class StepTensors(NamedTuple):
    """A step of training as a loss sees it: with gradients, in the dictionary's units."""

    autoencoder: SparseAutoencoder
    """The dictionary, which is not to be changed."""
    u: Float[Tensor, "batch d_in"]
    """The rows that are read."""
    v: Float[Tensor, "batch d_out"]
    """The rows that are predicted; u itself for an autoencoder proper."""
    y: Float[Tensor, "batch d_out"]
    """The reconstruction of v."""
    acts: Latents | Float[Tensor, "batch d_sae"]
    """The activations, as this kind of dictionary trains them."""
    dead: Bool[Tensor, " d_sae"]
    """The latents that are dead."""
    n_steps: int
    """Steps that were done before."""
    total_steps: int
    """Steps that there will be."""

    @property
    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """The activations of all latents."""
        if isinstance(self.acts, Latents):
            return to_dense(self.acts, len(self.dead))
        return self.acts

    @property
    def latents(self) -> Latents:
        """The activations in sparse form."""
        return self.acts if isinstance(self.acts, Latents) else to_latents(self.acts)


@runtime_checkable
class Loss(Protocol):
    """A loss of the user's own: any object that can be called so.

    It is a mean over the rows of a batch, or independent of them: a batch may be cut into parts.
    """

    @property
    def needs(self) -> Literal["output", "latents", "dense"]:
        """What it looks at; "dense" is all of d_sae, which takes memory with sparse latents."""
        ...

    def __call__(self, step: StepTensors) -> Float[Tensor, ""]:
        """One number, which is added to the other losses."""
        ...


def squared_error(
    x: Float[Tensor, "batch d_out"], x_hat: Float[Tensor, "batch d_out"]
) -> Float[Tensor, ""]:
    """Mean over rows of ||x - x_hat||^2, summed over d (Scaling Monosemanticity, 2024)."""
    return (x - x_hat).square().sum(dim=1).mean()


def l1_decoder_norm(
    acts: Float[Tensor, "batch k"], norms: Float[Tensor, "batch k"] | Float[Tensor, " k"]
) -> Float[Tensor, ""]:
    """Mean over rows of sum_i a_i ||W_dec[i]|| (Scaling Monosemanticity, 2024).

    Unchanged when a latent's activation is multiplied by c and its direction divided by c.
    `norms` are the norms of the decoder rows: one per column, or one per place of sparse acts.
    """
    return (acts * norms).sum(dim=1).mean()


def l0_penalty(l0: Float[Tensor, ""], target: float | None) -> Float[Tensor, ""]:
    """The mean number of latents that fire in a row, or (L0 / target - 1)^2 with a target."""
    return l0 if target is None else (l0 / target - 1).square()


def power_decoder_norm(
    acts: Float[Tensor, "batch d_sae"], norms: Float[Tensor, " d_sae"], p: float
) -> Float[Tensor, ""]:
    """Mean over rows of sum_i (a_i ||W_dec[i]||)^p over what fires (arXiv 2408.00113)."""
    sizes, fires = acts * norms, acts > 0
    # a root has no gradient at 0
    return (sizes.where(fires, sizes.new_ones(())).pow(p) * fires).sum(dim=1).mean()


def tanh_decoder_norm(
    acts: Float[Tensor, "batch d_sae"], norms: Float[Tensor, " d_sae"], scale: float
) -> Float[Tensor, ""]:
    """Mean over rows of sum_i tanh(scale a_i ||W_dec[i]||) (Anthropic, January 2025)."""
    return (acts * (norms * scale)).tanh().sum(dim=1).mean()


def pre_act_distance(
    pre: Float[Tensor, "batch dead"],
    threshold: Float[Tensor, " dead"],
    norms: Float[Tensor, " dead"],
) -> Float[Tensor, ""]:
    """Mean over rows of sum_i max(threshold_i - h_i, 0) ||W_dec[i]|| (Anthropic, January 2025)."""
    return ((threshold - pre).relu() @ norms).mean()


def batch_variance(x: Float[Tensor, "batch d_out"]) -> Float[Tensor, ""]:
    """Mean over rows of ||x - mean||^2, the mean per dimension over this batch."""
    return (x - x.mean(dim=0)).square().sum(dim=1).mean()
