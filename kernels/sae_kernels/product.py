"""The encoder's product `pre = (x - b_in) @ enc_rows.T + b_enc`, in chunks, and its gradients.

What is kept of the pre-activations is the matter of the encoders: they hand in a rule that goes
through the chunks. However many each row keeps, the backward is the same.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_kernels.decode import weighted_rows
from sae_kernels.grads import accumulator, segment_product, segment_sum
from sae_kernels.launch import Backend, Entries, check_floating, check_shape, workspace

# Pre-activations held at a time on a CPU, which loses more to page faults and cache misses on a
# larger workspace than the matrix product gains from it.
WORKSPACE_BYTES = 1 << 25


class SelectedPre(NamedTuple):
    """What was kept of the pre-activations: (batch, k), or (entry,) with a row pointer."""

    values: Float[Tensor, "batch k"] | Float[Tensor, " entry"]
    indices: Int[Tensor, "batch k"] | Int[Tensor, " entry"]
    row_ptr: Int[Tensor, " bound"] | None = None


class Product(NamedTuple):
    """The operands of `x @ rows.T + bias`: x and rows in one dtype, the bias in float32 or 64."""

    x: Float[Tensor, "batch d_in"]
    rows: Float[Tensor, "d_sae d_in"]
    bias: Float[Tensor, " d_sae"]

    def chunks(self) -> Iterator[tuple[slice, Float[Tensor, "row d_sae"]]]:
        """Go through the pre-activations some rows at a time, always in the same memory."""
        batch, d_sae = len(self.x), len(self.rows)
        dtype, device = self.bias.dtype, self.bias.device
        space = workspace(device, WORKSPACE_BYTES)
        n_rows = max(1, min(batch, space // (d_sae * dtype.itemsize)))
        held = torch.empty(n_rows, d_sae, dtype=dtype, device=device)
        for start in range(0, batch, n_rows):
            pre = held[: batch - start]
            rows = slice(start, start + len(pre))
            self._multiply(self.x[rows], pre)
            yield rows, pre

    def _multiply(self, x: Float[Tensor, "row d_in"], out: Float[Tensor, "row d_sae"]) -> None:
        if x.dtype == out.dtype:
            torch.addmm(self.bias, x, self.rows.T, out=out)
        elif x.is_cuda:
            torch.mm(x, self.rows.T, out_dtype=out.dtype, out=out).add_(self.bias)
        else:  # a CPU has no product of bfloat16 into float32: it is rounded once in between
            out.copy_(torch.mm(x, self.rows.T)).add_(self.bias)


def product_dtype(x: Float[Tensor, "batch d_in"]) -> torch.dtype:
    """Name the dtype of the encoder's product: that of autocast where it is on, else of `x`."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def centre(
    x: Float[Tensor, "batch d_in"], b_in: Float[Tensor, " d_in"] | None
) -> Float[Tensor, "batch d_in"]:
    """Return `x - b_in` in the accumulator's dtype: x is smaller than enc_rows, so no folding."""
    x = x.to(accumulator(x.dtype))
    return x if b_in is None else x - b_in.to(x.dtype)


def dense_pre(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    b_in: Float[Tensor, " d_in"] | None,
) -> Float[Tensor, "batch d_sae"]:
    """Compute all pre-activations at once, for the references; differentiable by autograd."""
    dtype, low = accumulator(x.dtype), product_dtype(x)
    product = centre(x, b_in).to(low) @ enc_rows.to(low).T
    return product.to(dtype) + b_enc.to(dtype)


def check_encoder(
    x: Shaped[Tensor, "..."],
    enc_rows: Shaped[Tensor, "..."],
    b_enc: Shaped[Tensor, "..."],
    b_in: Shaped[Tensor, "..."] | None,
) -> None:
    """Refuse operands that do not fit each other."""
    check_floating(x=x, enc_rows=enc_rows, b_enc=b_enc, b_in=b_in)
    check_shape("enc_rows", enc_rows, None, None)
    d_sae, d_in = enc_rows.shape
    check_shape("x", x, None, d_in)
    check_shape("b_enc", b_enc, d_sae)
    check_shape("b_in", b_in, d_in)


class SelectionRule(NamedTuple):
    """What is kept of a product, and how the kept values are differentiated."""

    keep: Callable[[Product], SelectedPre]
    relu: bool
    backend: Backend


class Encode(torch.autograd.Function):
    """Keep what the rule keeps; the values have gradients, the indices and bounds none."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "batch d_in"],
        enc_rows: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        b_in: Float[Tensor, " d_in"] | None,
        rule: SelectionRule,
    ) -> SelectedPre:
        """Multiply in the dtype of the product, without autocast inside."""
        dtype = product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            rows = enc_rows.to(dtype)
            product = Product(centre(x, b_in).to(dtype), rows, b_enc.to(accumulator(dtype)))
            selected = rule.keep(product)
        ctx.save_for_backward(x, enc_rows, b_in, *selected)
        ctx.rule = rule
        ctx.mark_non_differentiable(*(t for t in selected[1:] if t is not None))
        return selected

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_values: Float[Tensor, "..."], *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Sum over the kept entries alone."""
        x, enc_rows, b_in, *selected = ctx.saved_tensors
        grads = encoder_grads(
            d_values,
            (x, enc_rows, b_in),
            SelectedPre(*selected),
            ctx.rule,
            ctx.needs_input_grad[:4],
        )
        return *grads, None


def encoder_grads(
    d_values: Float[Tensor, "..."],
    encoder: tuple[Tensor, Tensor, Tensor | None],
    selected: SelectedPre,
    rule: SelectionRule,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of x, enc_rows, b_enc and b_in that `needs` asks for, else None."""
    (x, enc_rows, b_in), (values, indices, row_ptr) = encoder, selected
    needs_x, needs_rows, _, needs_b_in = needs
    if rule.relu:  # a NaN keeps its gradient, as in torch.relu
        d_values = d_values.masked_fill(values <= 0, 0.0)
    d_x = d_rows = d_b_enc = d_b_in = None
    with torch.autocast(x.device.type, enabled=False):
        if needs_x:
            d_x = weighted_rows(d_values, indices, enc_rows, row_ptr, rule.backend).to(x.dtype)
        if any(needs[1:]):
            entries = Entries(indices, len(enc_rows), row_ptr)
            d_b_enc = segment_sum(entries, d_values).to(enc_rows.dtype)
            if needs_rows:
                d_rows = segment_product(entries, d_values, centre(x, b_in), rule.backend)
                d_rows = d_rows.to(enc_rows.dtype)
            if needs_b_in:  # the sum of -d_x over the batch, as one matrix-vector product
                d_b_in = -(d_b_enc @ enc_rows)
    return d_x, d_rows, d_b_enc, d_b_in
