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


def batch_variance(x: Float[Tensor, "batch d_out"]) -> Float[Tensor, ""]:
    """Mean over rows of ||x - mean||^2, the mean per dimension over this batch."""
    return (x - x.mean(dim=0)).square().sum(dim=1).mean()
