"""Losses of a batch, all in the dictionary's units: plain functions of tensors."""

from jaxtyping import Float
from torch import Tensor


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
