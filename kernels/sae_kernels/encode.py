"""Encoder and top-k in one op: `pre = (x - b_in) @ enc_rows.T + b_enc`, then the k largest."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_kernels.decode import weighted_bags
from sae_kernels.grads import accumulator, segment_product, segment_sum, segments
from sae_kernels.launch import (
    check_floating,
    check_k,
    check_shape,
    choose,
)
from sae_kernels.select import TopK, topk_select, topk_select_reference

# Pre-activations held at a time on a CPU, which loses more to page faults and cache misses on a
# larger workspace than the matrix product gains from it. Other devices take more at a time.
WORKSPACE_BYTES = 1 << 25
LARGER_WORKSPACE = 8


def product_dtype(x: Float[Tensor, "batch d_in"]) -> torch.dtype:
    """Name the dtype of the encoder's product: that of autocast where it is on, else of `x`."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def encode_topk_reference(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
    relu: bool = True,
) -> TopK:
    """Compute all pre-activations at once and select from a stable sort; dense gradients."""
    dtype = accumulator(x.dtype)
    centred = x.to(dtype) if b_in is None else x.to(dtype) - b_in.to(dtype)
    product = centred.to(product_dtype(x)) @ enc_rows.to(product_dtype(x)).T
    return topk_select_reference(product.to(dtype) + b_enc.to(dtype), k, relu=relu)


def _centre(
    x: Float[Tensor, "batch d_in"], b_in: Float[Tensor, " d_in"] | None
) -> Float[Tensor, "batch d_in"]:
    """Return `x - b_in` in the accumulator's dtype: x is smaller than enc_rows, so no folding."""
    x = x.to(accumulator(x.dtype))
    return x if b_in is None else x - b_in.to(x.dtype)


class _Product(NamedTuple):
    """The operands of `x @ rows.T + bias`: x and rows in one dtype, the bias in float32 or 64."""

    x: Float[Tensor, "batch d_in"]
    rows: Float[Tensor, "d_sae d_in"]
    bias: Float[Tensor, " d_sae"]

    def into(self, out: Float[Tensor, "row d_sae"], start: int) -> None:
        """Write the pre-activations of the rows from `start` on to `out`."""
        x = self.x[start : start + len(out)]
        if x.dtype == out.dtype:
            torch.addmm(self.bias, x, self.rows.T, out=out)
        elif x.is_cuda:
            out.copy_(torch.mm(x, self.rows.T, out_dtype=out.dtype)).add_(self.bias)
        else:  # a CPU has no product of bfloat16 into float32: it is rounded once in between
            out.copy_(torch.mm(x, self.rows.T)).add_(self.bias)


def _encode(product: _Product, k: int, relu: bool) -> TopK:
    """Select from the product in chunks of rows that share one workspace."""
    batch, d_sae = len(product.x), len(product.rows)
    dtype, device = product.bias.dtype, product.bias.device
    space = WORKSPACE_BYTES * (1 if device.type == "cpu" else LARGER_WORKSPACE)
    n_rows = max(1, min(batch, space // (d_sae * dtype.itemsize)))
    workspace = torch.empty(n_rows, d_sae, dtype=dtype, device=device)
    values = torch.empty(batch, k, dtype=dtype, device=device)
    indices = torch.empty(batch, k, dtype=torch.int64, device=device)
    for start in range(0, batch, n_rows):
        pre = workspace[: batch - start]
        product.into(pre, start)
        rows = slice(start, start + len(pre))
        values[rows], indices[rows] = topk_select(pre, k, relu=relu, backend="torch")
    return TopK(values, indices)


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
    ) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
        dtype = product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            rows = enc_rows.to(dtype)
            product = _Product(_centre(x, b_in).to(dtype), rows, b_enc.to(accumulator(dtype)))
            values, indices = _encode(product, k, relu)
        ctx.save_for_backward(x, enc_rows, b_in, values, indices)
        ctx.relu = relu
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_values: Float[Tensor, "batch k"], _: Int[Tensor, "batch k"] | None
    ) -> tuple[Tensor | None, ...]:
        x, enc_rows, b_in, values, indices = ctx.saved_tensors
        needs_x, needs_rows, _, needs_b_in = ctx.needs_input_grad[:4]
        if ctx.relu:  # a NaN keeps its gradient, as in torch.relu
            d_values = d_values.masked_fill(values <= 0, 0.0)
        d_x = d_rows = d_b_enc = d_b_in = None
        with torch.autocast(x.device.type, enabled=False):
            if needs_x:
                d_x = weighted_bags(d_values, indices, enc_rows.contiguous()).to(x.dtype)
            if any(ctx.needs_input_grad[1:4]):
                parts = segments(indices, len(enc_rows))
                d_b_enc = segment_sum(parts, d_values).to(enc_rows.dtype)
                if needs_rows:
                    d_rows = segment_product(parts, d_values, _centre(x, b_in)).to(enc_rows.dtype)
                if needs_b_in:  # the sum of -d_x over the batch, as one matrix-vector product
                    d_b_in = -(d_b_enc @ enc_rows)
        return d_x, d_rows, d_b_enc, d_b_in, None, None


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
    """Encode and keep the k largest pre-activations of each row, without storing them all.

    `pre = (x - b_in) @ enc_rows.T + b_enc`; `topk_select` states the rule. The values are
    differentiable once in x, enc_rows, b_enc and b_in (with `relu`, where a value is > 0); the
    indices have no gradient. x is centred in float32, and selection is in float32 (float64 for
    float64). Under autocast the product takes inputs of autocast's dtype; on a CPU its result is
    rounded to that dtype before the bias is added, on CUDA it is float32.

    Args:
        x: activations (batch, d_in).
        enc_rows: one row per latent (d_sae, d_in).
        b_enc: bias (d_sae,).
        k: how many, 1 <= k <= d_sae.
        b_in: what is subtracted from x (d_in,).
        relu: clamp the values at 0; the indices are the same.
        backend: a forced backend; the fastest one by default.

    Returns:
        values (batch, k) in float32 (float64 for float64) and int64 indices (batch, k), ascending.

    Raises:
        ValueError: if shapes, devices, k or the backend do not fit.
        TypeError: if the tensors are not floating point or differ in dtype.
    """
    check_floating(x=x, enc_rows=enc_rows, b_enc=b_enc, b_in=b_in)
    check_shape("enc_rows", enc_rows, None, None)
    d_sae, d_in = enc_rows.shape
    check_shape("x", x, None, d_in)
    check_shape("b_enc", b_enc, d_sae)
    check_shape("b_in", b_in, d_in)
    check_k(k, d_sae)
    if choose(x, backend) == "reference":
        return encode_topk_reference(x, enc_rows, b_enc, k, b_in=b_in, relu=relu)
    return TopK(*_EncodeTopK.apply(x, enc_rows, b_enc, b_in, k, relu))
