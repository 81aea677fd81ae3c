"""AuxK: what the dead latents alone reconstruct (Gao et al. 2024, arXiv 2406.04093, A.2).

k_aux is large and the dead are few, so dense products over the compacted dead set beat gathers.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_kernels.launch import check_floating, check_shape, choose
from sae_kernels.select import topk_select


def auxk_reference(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    dead: Bool[Tensor, " d_sae"],
    k_aux: int,
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, "batch d_out"]:
    """The same over all latents, the live ones masked out."""
    k = min(k_aux, int(dead.sum()))
    if k == 0:
        return x.new_zeros(len(x), dec_rows.shape[1])
    pre = (x if b_in is None else x - b_in) @ enc_rows.T + b_enc
    order = pre.masked_fill(~dead, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    mask = torch.zeros_like(pre).scatter(1, order[:, :k], 1.0)
    return (pre.relu() * mask) @ dec_rows


def auxk(  # noqa: PLR0913 - both sides of an autoencoder
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
    """Reconstruction by the k_aux strongest dead latents of each row, without a bias.

    The caller compares it with the detached residual. Gradients reach x, both weights, b_enc and
    b_in. Without dead latents the result is 0.

    Args:
        x: rows (batch, d_in).
        enc_rows: encoder (d_sae, d_in).
        b_enc: bias (d_sae,).
        dec_rows: decoder (d_sae, d_out).
        dead: which latents are dead (d_sae,).
        k_aux: dead latents that may fire in a row; all of them where there are fewer.
        b_in: subtracted from every row (d_in,), if any.
        backend: a forced backend; the fastest one by default.

    Raises:
        ValueError: if shapes, k_aux or the backend are wrong.
        TypeError: if dtypes are wrong.
    """
    check_shape("x", x, None, None)
    d_sae = len(enc_rows)
    check_shape("enc_rows", enc_rows, None, x.shape[1])
    check_shape("dec_rows", dec_rows, d_sae, None)
    for name, tensor, width in (("b_enc", b_enc, d_sae), ("dead", dead, d_sae)):
        check_shape(name, tensor, width)
    check_shape("b_in", b_in, x.shape[1])
    check_floating(x=x, enc_rows=enc_rows, b_enc=b_enc, dec_rows=dec_rows, b_in=b_in)
    if k_aux < 1:
        raise ValueError(f"k_aux must be at least 1, got {k_aux}")
    if choose(x, backend) == "reference":
        return auxk_reference(x, enc_rows, b_enc, dec_rows, dead, k_aux, b_in=b_in)
    ids = dead.nonzero().squeeze(1)
    if len(ids) == 0:
        return x.new_zeros(len(x), dec_rows.shape[1])
    centred = x if b_in is None else x - b_in
    pre = torch.addmm(b_enc.index_select(0, ids), centred, enc_rows.index_select(0, ids).T)
    chosen = topk_select(pre.to(x.dtype), min(k_aux, len(ids)))
    acts = torch.zeros_like(pre, dtype=x.dtype).scatter(1, chosen.indices, chosen.values)
    return acts @ dec_rows.index_select(0, ids)
