"""The dead latents' reconstruction, for the AuxK loss of Gao et al. (arXiv 2406.04093, A.2)."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_kernels.grads import accumulator
from sae_kernels.launch import check_floating, check_shape, choose
from sae_kernels.select import topk_select


def _keep(
    pre: Float[Tensor, "batch d_sae"], picked: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch d_sae"]:
    """Apply the ReLU to the picked latents, and set the others to 0."""
    dropped = torch.ones_like(pre, dtype=torch.bool).scatter_(1, picked, False)
    return pre.relu().masked_fill(dropped, 0.0)


def auxk_reference(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    dead: Bool[Tensor, " d_sae"],
    k: int,
) -> Float[Tensor, "batch d_out"]:
    """Encode with all latents, put the living ones below every other, select and decode."""
    pre = (x @ enc_rows.T + b_enc).to(accumulator(x.dtype))
    order = pre.detach().masked_fill(~dead, -math.inf)
    picked = topk_select(order, k, backend="reference").indices
    return _keep(pre, picked).to(dec_rows.dtype) @ dec_rows


def _auxk_torch(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    dead: Int[Tensor, " row"],
    k: int,
) -> Float[Tensor, "batch d_out"]:
    """Encode and decode with the rows of the dead latents alone, dense."""
    pre = x @ enc_rows.index_select(0, dead).T + b_enc.index_select(0, dead)
    pre = pre.to(accumulator(x.dtype))
    picked = topk_select(pre.detach(), k, backend="torch").indices
    return _keep(pre, picked).to(dec_rows.dtype) @ dec_rows.index_select(0, dead)


def auxk(  # noqa: PLR0913
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    dead: Bool[Tensor, " d_sae"],
    k_aux: int,
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "batch d_out"]:
    """Reconstruct with the k_aux largest dead latents of each row: what they say of the residual.

    `relu(top k_aux of ((x - b_in) @ enc_rows.T + b_enc)[dead]) @ dec_rows[dead]`, without b_dec;
    the caller compares it with the detached residual. Differentiable in x, b_in and the weights.
    The products are dense, because k_aux is large (d_in / 2 in the paper).

    Args:
        x: activations (batch, d_in).
        enc_rows: one row per latent (d_sae, d_in).
        b_enc: bias (d_sae,).
        dec_rows: one row per latent (d_sae, d_out).
        dead: True for the latents that are dead (d_sae,).
        k_aux: how many, at least 1; all dead latents where they are fewer.
        b_in: what is subtracted from x (d_in,).
        backend: a forced backend; the fastest one by default.

    Returns:
        (batch, d_out) in the dtype of `dec_rows`; zeros where no latent is dead.

    Raises:
        ValueError: if shapes, devices, k_aux or the backend do not fit.
        TypeError: if `dead` is no mask, or the others are not floating point or differ in dtype.
    """
    check_floating(x=x, enc_rows=enc_rows, b_enc=b_enc, dec_rows=dec_rows, b_in=b_in)
    check_shape("enc_rows", enc_rows, None, None)
    d_sae, d_in = enc_rows.shape
    check_shape("x", x, None, d_in)
    check_shape("b_enc", b_enc, d_sae)
    check_shape("dec_rows", dec_rows, d_sae, None)
    check_shape("dead", dead, d_sae)
    check_shape("b_in", b_in, d_in)
    if dead.dtype != torch.bool:
        raise TypeError(f"dead must be a mask of bool, got {dead.dtype}")
    if k_aux < 1:
        raise ValueError(f"k_aux must be at least 1, got {k_aux}")
    name = choose(x, backend)
    ids = dead.nonzero().flatten()
    if not len(ids):
        return dec_rows.new_zeros(len(x), dec_rows.shape[1])
    x = x if b_in is None else x - b_in
    k = min(k_aux, len(ids))
    if name == "reference":
        x_hat = auxk_reference(x, enc_rows, b_enc, dec_rows, dead, k)
    else:
        x_hat = _auxk_torch(x, enc_rows, b_enc, dec_rows, ids, k)
    return x_hat.to(dec_rows.dtype)
