"""Encoder and top-k in one op: the pre-activations are never kept.

pre = (x - b_in) @ enc_rows.T + b_enc; values, indices = top-k of each row of pre.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_kernels.decode import weighted_rows
from sae_kernels.grads import segment_product, segment_sum, sort_by_latent
from sae_kernels.launch import check_floating, check_k, check_shape, choose
from sae_kernels.select import TopK, topk_select, topk_select_reference

WORKSPACE_BYTES = 256 << 20
"""Pre-activations held at a time."""


def encode_topk_reference(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
    relu: bool = True,
) -> TopK:
    """All pre-activations, then a stable sort; differentiable by autograd."""
    centred = x if b_in is None else x - b_in
    return topk_select_reference(centred @ enc_rows.T + b_enc, k, relu=relu)


def pre_acts(
    centred: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
) -> Float[Tensor, "batch d_sae"]:
    """Pre-activations in the dtype of b_enc.

    Under autocast the product takes and, on a CPU, gives the low-precision format; the bias is
    added and the selection made in fp32.
    """
    if torch.is_autocast_enabled(centred.device.type):
        return (centred @ enc_rows.T).to(b_enc.dtype).add_(b_enc)
    return torch.addmm(b_enc, centred, enc_rows.T)


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "batch d_in"],
        enc_rows: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        b_in: Float[Tensor, " d_in"] | None,
        k: int,
        relu: bool,
    ) -> tuple[Tensor, Tensor]:
        centred = x if b_in is None else x - b_in
        n_rows = max(1, WORKSPACE_BYTES // (len(enc_rows) * b_enc.element_size()))
        parts = [
            topk_select(pre_acts(part, enc_rows, b_enc), k, relu=relu)
            for part in centred.split(n_rows)
        ]
        values = torch.cat([part.values for part in parts])
        indices = torch.cat([part.indices for part in parts])
        ctx.relu = relu
        ctx.save_for_backward(centred, enc_rows, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_values: Float[Tensor, "batch k"], _: Tensor
    ) -> tuple[Tensor | None, ...]:
        centred, enc_rows, values, indices = ctx.saved_tensors
        needs_x, needs_rows, needs_bias, needs_centre = ctx.needs_input_grad[:4]
        if ctx.relu:
            d_values = d_values * (values > 0)
        d_x = weighted_rows(d_values, indices, enc_rows) if needs_x else None
        if not (needs_rows or needs_bias or needs_centre):
            return d_x, None, None, None, None, None
        segments = sort_by_latent(indices, len(enc_rows))
        d_rows = segment_product(segments, d_values, centred) if needs_rows else None
        d_bias = segment_sum(segments, d_values)
        # Every row is centred by the same vector, so its gradient is one matrix-vector product.
        d_centre = -(d_bias @ enc_rows) if needs_centre else None
        return d_x, d_rows, d_bias if needs_bias else None, d_centre, None, None


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
    relu: bool = True,
    backend: str | None = None,
) -> TopK:
    """The k largest pre-activations of each row and their latents, ascending by latent.

    Ties go by value descending, index ascending. The gradient of the values reaches x, enc_rows,
    b_enc and b_in; where relu clamped a value it is 0. Indices have none. No second derivative.

    Args:
        x: rows (batch, d_in).
        enc_rows: encoder, one row per latent (d_sae, d_in).
        b_enc: bias (d_sae,).
        k: how many, 1 <= k <= d_sae.
        b_in: subtracted from every row (d_in,), if any.
        relu: clamp the values at 0.
        backend: a forced backend; the fastest one by default.

    Raises:
        ValueError: if shapes, k or the backend are wrong.
        TypeError: if dtypes are wrong.
    """
    check_shape("x", x, None, None)
    check_shape("enc_rows", enc_rows, None, x.shape[1])
    check_shape("b_enc", b_enc, len(enc_rows))
    check_shape("b_in", b_in, x.shape[1])
    check_floating(x=x, enc_rows=enc_rows, b_enc=b_enc, b_in=b_in)
    check_k(k, len(enc_rows))
    if choose(x, backend) == "reference":
        return encode_topk_reference(x, enc_rows, b_enc, k, b_in=b_in, relu=relu)
    return TopK(*_EncodeTopK.apply(x, enc_rows.contiguous(), b_enc, b_in, k, relu))  # pyright: ignore[reportGeneralTypeIssues]
