"""The dead latents' reconstruction, for the AuxK loss of Gao et al. (arXiv 2406.04093, A.2)."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_kernels.grads import accumulator
from sae_kernels.launch import KernelError, check_floating, check_shape, choose, workspace
from sae_kernels.product import product_dtype
from sae_kernels.select import CHUNK, topk_select


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


def _keep(
    pre: Float[Tensor, "batch d_sae"], picked: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch d_sae"]:
    """Apply the ReLU to the picked latents, and set the others to 0."""
    dropped = torch.ones_like(pre, dtype=torch.bool).scatter_(1, picked, False)
    return pre.relu().masked_fill(dropped, 0.0)


def _largest(v: Float[Tensor, "batch d_sae"], k: int) -> Float[Tensor, "batch d_sae"]:
    """Apply the ReLU to the k largest, as `topk_select` takes them, and set the others to 0.

    On a CPU by the k-th value of each row, which costs less than the places of all k.
    """
    n = v.shape[1]
    if v.device.type != "cpu" or k == n:
        return _keep(v, topk_select(v, k).indices)
    kth = torch.from_numpy(np.partition(v.numpy(), n - k, axis=1)[:, n - k, None].copy())
    if bool(kth.isnan().any()):
        return _keep(v, topk_select(v, k, backend="torch").indices)
    dropped = v < kth  # NaN is below nothing, and stays
    surplus = n - k - dropped.sum(dim=1, keepdim=True)
    if bool(surplus.any()):  # of those that tie at the k-th value the last ones go
        tied = v == kth
        rank = tied.cumsum(dim=1, dtype=torch.int32)
        dropped |= tied & (rank > rank[:, -1:] - surplus)
    return v.relu().masked_fill_(dropped, 0.0)


class FewLatents(NamedTuple):
    """The latents that are worked with: the dead ones, and after them some that are not."""

    ids: Int[Tensor, " row"]
    is_dead: Bool[Tensor, " row"] | None


def few_of(dead: Bool[Tensor, " d_sae"], most: int | None) -> FewLatents:
    """Name the dead latents; where `most` bounds their number nothing is waited for."""
    if most is None:
        return FewLatents(dead.nonzero().squeeze(1), None)
    ids = dead.nonzero_static(size=most, fill_value=0).squeeze(1)
    return FewLatents(ids, torch.arange(most, device=ids.device) < dead.sum())


class _DenseAuxK(torch.autograd.Function):
    """Encode and decode with the given latents alone; dense products, three of them backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "batch d_in"],
        enc_rows: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        dec_rows: Float[Tensor, "d_sae d_out"],
        is_dead: Bool[Tensor, " d_sae"] | None,
        k: int,
    ) -> Float[Tensor, "batch d_out"]:
        """Multiply in the dtype of the product, without autocast inside; select in float32."""
        low, dtype = product_dtype(x), accumulator(x.dtype)
        ctx.dtypes = (x.dtype, dec_rows.dtype)
        with torch.autocast(x.device.type, enabled=False):
            x, enc_rows, dec_rows = x.to(low), enc_rows.to(low), dec_rows.to(low)
            spare = torch.empty(len(x), len(enc_rows), dtype=low, device=x.device)
            n_rows = max(1, workspace(x.device, 4 * CHUNK) // (4 * len(enc_rows)))
            for some, result in zip(x.split(n_rows), spare.split(n_rows), strict=True):
                pre = (some @ enc_rows.T).to(dtype).add_(b_enc)
                if is_dead is not None:
                    pre.masked_fill_(~is_dead, -math.inf)
                result.copy_(_largest(pre, k))
            ctx.save_for_backward(x, enc_rows, dec_rows, spare)
            return (spare @ dec_rows).to(ctx.dtypes[1])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Float[Tensor, "batch d_out"]
    ) -> tuple[Tensor | None, ...]:
        """Go back through what was kept; a NaN keeps its gradient, as in torch.relu."""
        x, enc_rows, dec_rows, spare = ctx.saved_tensors
        of_x, of_rows = ctx.dtypes
        with torch.autocast(x.device.type, enabled=False):
            grad = grad.to(spare.dtype)
            d_pre = (grad @ dec_rows.T).masked_fill_(spare <= 0, 0.0)
            d_x = (d_pre @ enc_rows).to(of_x) if ctx.needs_input_grad[0] else None
            d_enc_rows, d_dec_rows = (d_pre.T @ x).to(of_rows), (spare.T @ grad).to(of_rows)
            d_b_enc = d_pre.sum(dim=0, dtype=accumulator(spare.dtype)).to(of_rows)
        return d_x, d_enc_rows, d_b_enc, d_dec_rows, None, None


def _auxk_torch(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    few: FewLatents,
    k: int,
) -> Float[Tensor, "batch d_out"]:
    """Gather the rows of the dead latents, so that all products are over them alone."""
    rows = (t.index_select(0, few.ids) for t in (enc_rows, b_enc, dec_rows))
    return _DenseAuxK.apply(x, *rows, few.is_dead, k)  # pyright: ignore[reportReturnType]


def auxk(  # noqa: PLR0913
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    dead: Bool[Tensor, " d_sae"],
    k_aux: int,
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
    most: int | None = None,
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
        most: a number that the dead latents do not exceed; with it the device is not waited for.
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
        raise KernelError(f"k_aux must be at least 1, got {k_aux}")
    name = choose(x, backend)
    few = few_of(dead, most)
    if not len(few.ids):
        return dec_rows.new_zeros(len(x), dec_rows.shape[1])
    x = x if b_in is None else x - b_in
    k = min(k_aux, len(few.ids))
    if name == "reference":
        x_hat = auxk_reference(x, enc_rows, b_enc, dec_rows, dead, k)
    else:
        x_hat = _auxk_torch(x, enc_rows, b_enc, dec_rows, few, k)
    return x_hat.to(dec_rows.dtype)
