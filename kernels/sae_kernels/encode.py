"""Encoder and top-k in one op: `pre = (x - b_in) @ enc_rows.T + b_enc`, then the k largest.

Encoder and group maxima in one op: of each of k groups of neighbours the largest fires.

    pre = (x - b_in) @ enc_rows.T + b_enc
    group g holds the latents g * d_sae / k .. (g + 1) * d_sae / k - 1

On equal values the lower index wins; NaN is larger than every number.

As `torch.compile` sees it the op is opaque, with shapes for its tracing and with a gradient. The
operator calls the public function, which checks the arguments when the compiled code runs; its
annotations are bare tensors, because torch reads the operator's schema from them.
"""

from functools import partial
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sae_kernels.grads import accumulator
from sae_kernels.launch import Backend, KernelError, check_k, choose
from sae_kernels.product import (
    Encode,
    Product,
    SelectedPre,
    SelectionRule,
    check_encoder,
    dense_pre,
    encoder_grads,
    product_dtype,
)
from sae_kernels.screen import (
    CertifiedTopK,
    Screen,
    best_screen,
    certified_topk,
    is_rescored,
)
from sae_kernels.select import TopKResult, topk_select, topk_select_reference


def encode_topk_reference(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
    relu: bool = True,
) -> TopKResult:
    """Compute all pre-activations at once and select from a stable sort; dense gradients."""
    return topk_select_reference(dense_pre(x, enc_rows, b_enc, b_in), k, relu=relu)


def _keep_topk(product: Product, k: int, relu: bool, backend: Backend) -> SelectedPre:
    """Select from the product in chunks of rows that share one workspace."""
    if backend == "triton":
        from sae_kernels import encode_triton

        x, rows, bias = (t.contiguous() for t in product)
        return SelectedPre(*encode_triton.encode_topk(x, rows, bias, k, relu))
    if is_rescored(product, k):
        result = certified_topk(product, k, best_screen(product, k))
        return SelectedPre(result.values.relu_() if relu else result.values, result.indices)
    batch, bias = len(product.x), product.bias
    values = torch.empty(batch, k, dtype=bias.dtype, device=bias.device)
    indices = torch.empty(batch, k, dtype=torch.int64, device=bias.device)
    for rows, pre in product.chunks():
        values[rows], indices[rows] = topk_select(pre, k, relu=relu, backend=backend)
    return SelectedPre(values, indices)


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
    relu: bool = True,
    backend: str | None = None,
) -> TopKResult:
    """Encode and keep the k largest pre-activations of each row, without storing them all.

    `pre = (x - b_in) @ enc_rows.T + b_enc`; `topk_select` states the rule. The values are
    differentiable once in x, enc_rows, b_enc and b_in (with `relu`, where a value is > 0); the
    indices have no gradient. x is centred in float32, and selection is in float32 (float64 for
    float64). Under autocast the product takes inputs of autocast's dtype; on a CPU its result is
    rounded to that dtype before the bias is added, on CUDA it is float32.

    On a CPU, in float32 and with at least 256 latents for each that is kept, `pre` is computed in
    float64 and rounded once, for the candidates that a cheaper product names: see `screened_topk`.

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
    if torch.compiler.is_compiling():
        return _compiled_encode(x, enc_rows, b_enc, b_in, k, relu, backend)
    check_encoder(x, enc_rows, b_enc, b_in)
    check_k(k, len(enc_rows))
    name = choose(x, backend)
    if name == "reference":
        return encode_topk_reference(x, enc_rows, b_enc, k, b_in=b_in, relu=relu)
    rule = SelectionRule(partial(_keep_topk, k=k, relu=relu, backend=name), relu, name)
    values, indices, _ = Encode.apply(x, enc_rows, b_enc, b_in, rule)
    return TopKResult(values, indices)


def screened_topk(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
    relu: bool = True,
    screen: str | None = None,
) -> CertifiedTopK:
    """Do what `encode_topk` does in float32 on a CPU, with a given screen, and count its failures.

    The screen is a cheap product of all latents that names candidates; they are computed in
    float64, rounded once, and the selection is proved for each row from bounds on the screen's
    error. Rows without a proof are done again with more care. Values and indices therefore equal
    those of `encode_topk` bit for bit, for every input and every screen.

    Args:
        x: activations (batch, d_in) in float32, on a CPU.
        enc_rows: one row per latent (d_sae, d_in).
        b_enc: bias (d_sae,).
        k: how many, 1 <= k <= d_sae. With fewer than 256 latents for each that is kept, nothing is
            screened, as in `encode_topk`.
        b_in: what is subtracted from x (d_in,).
        relu: clamp the values at 0; the indices are the same.
        screen: "bfloat16" or "float32"; the faster one by default, as measured in this process.

    Returns:
        values and indices as `encode_topk` gives them, differentiable alike, and the number of
        rows that the screen left without a proof.

    Raises:
        ValueError: if shapes, k, the device or the screen do not fit.
        TypeError: if the tensors are not float32.
    """
    check_encoder(x, enc_rows, b_enc, b_in)
    check_k(k, len(enc_rows))
    if x.dtype != torch.float32:
        raise TypeError(f"x must be torch.float32 to be screened, got {x.dtype}")
    if x.device.type != "cpu":
        raise KernelError(f"x must be on a CPU to be screened, got {x.device}; use encode_topk")
    if screen not in {None, *get_args(Screen)}:
        raise KernelError(f"screen must be one of 'bfloat16', 'float32', got {screen!r}")
    n_fallback = 0

    def keep(product: Product) -> SelectedPre:
        nonlocal n_fallback
        if not is_rescored(product, k):
            return _keep_topk(product, k, relu, "torch")
        name: Screen = best_screen(product, k) if screen is None else screen  # pyright: ignore[reportAssignmentType]
        values, indices, n_fallback = certified_topk(product, k, name)
        return SelectedPre(values.relu_() if relu else values, indices)

    with torch.autocast("cpu", enabled=False):
        values, indices, _ = Encode.apply(
            x, enc_rows, b_enc, b_in, SelectionRule(keep, relu, "torch")
        )
    return CertifiedTopK(values, indices, n_fallback)


def _maxima(pre: Float[Tensor, "batch d_sae"], k: int) -> TopKResult:
    size = pre.shape[1] // k
    best = pre.unflatten(1, (k, size)).max(dim=2)
    return TopKResult(best.values, best.indices + torch.arange(k, device=pre.device) * size)


def encode_group_max_reference(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
    relu: bool = True,
) -> TopKResult:
    """Go through the groups one by one; dense gradients."""
    pre = dense_pre(x, enc_rows, b_enc, b_in)
    size = pre.shape[1] // k
    indices = torch.stack([part.argmax(dim=1) for part in pre.split(size, dim=1)], dim=1)
    indices = indices + torch.arange(0, pre.shape[1], size, device=pre.device)
    values = pre.gather(1, indices)
    return TopKResult(values.relu() if relu else values, indices)


def _keep_maxima(product: Product, k: int, relu: bool) -> SelectedPre:
    """Take the maxima of the product in chunks of rows that share one workspace."""
    batch, bias = len(product.x), product.bias
    values = torch.empty(batch, k, dtype=bias.dtype, device=bias.device)
    indices = torch.empty(batch, k, dtype=torch.int64, device=bias.device)
    for rows, pre in product.chunks():
        values[rows], indices[rows] = _maxima(pre, k)
    return SelectedPre(values.relu_() if relu else values, indices)


def encode_group_max(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
    relu: bool = True,
    backend: str | None = None,
) -> TopKResult:
    """Encode and keep the largest pre-activation of each of k groups, without storing them all.

    The arithmetic, gradients and dtypes are those of `encode_topk`, and so are the arguments; k is
    the number of groups and divides d_sae. Selection is torch's on every device.

    Returns:
        values (batch, k) in float32 (float64 for float64) and int64 indices (batch, k), ascending.

    Raises:
        ValueError: if shapes, devices, k or the backend do not fit.
        TypeError: if the tensors are not floating point or differ in dtype.
    """
    check_encoder(x, enc_rows, b_enc, b_in)
    check_k(k, len(enc_rows))
    if len(enc_rows) % k:
        raise KernelError(f"k must divide d_sae={len(enc_rows)} into equal groups, got {k}")
    name = choose(x, backend)
    if name == "reference":
        return encode_group_max_reference(x, enc_rows, b_enc, k, b_in=b_in, relu=relu)
    rule = SelectionRule(partial(_keep_maxima, k=k, relu=relu), relu, name)
    result = Encode.apply(x, enc_rows, b_enc, b_in, rule)
    return TopKResult(result[0], result[1])


@torch.library.custom_op("sae_kernels::encode", mutates_args=())
def _encode_op(  # noqa: PLR0913  (an operator takes each tensor and number as its own argument)
    x: Tensor,
    enc_rows: Tensor,
    b_enc: Tensor,
    b_in: Tensor | None,
    k: int,
    relu: bool,
    backend: str | None,
    low: torch.dtype,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, low, enabled=low != x.dtype):
        result = encode_topk(x, enc_rows, b_enc, k, b_in=b_in, relu=relu, backend=backend)
    return result.values, result.indices


@_encode_op.register_fake
def _(x: Tensor, _rows: Tensor, _bias: Tensor, _b_in: Tensor | None, k: int, *_: Any) -> Any:
    shape = (x.shape[0], k)
    values = x.new_empty(shape, dtype=accumulator(x.dtype))
    return values, x.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("sae_kernels::encode_grads", mutates_args=())
def _encode_grads_op(  # noqa: PLR0913
    d_values: Tensor,
    x: Tensor,
    enc_rows: Tensor,
    b_in: Tensor | None,
    values: Tensor,
    indices: Tensor,
    relu: bool,
    backend: str | None,
    needs: list[bool],
) -> list[Tensor]:
    rule = SelectionRule(lambda _: SelectedPre(values, indices), relu, choose(x, backend))
    grads = encoder_grads(
        d_values, (x, enc_rows, b_in), SelectedPre(values, indices), rule, tuple(needs)
    )
    pairs = zip(grads, needs, strict=True)
    return [x.new_empty(0) if g is None or not need else g for g, need in pairs]


@_encode_grads_op.register_fake
def _(_grad: Tensor, x: Tensor, enc_rows: Tensor, *rest: Any) -> list[Tensor]:
    needs = rest[-1]
    whole = (x, enc_rows, enc_rows[:, 0], enc_rows[0])
    pairs = zip(whole, needs, strict=True)
    return [t.new_empty(t.shape) if need else x.new_empty(0) for t, need in pairs]


def _keep_for_encode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, enc_rows, _, b_in, _, ctx.relu, ctx.backend, _ = inputs
    ctx.save_for_backward(x, enc_rows, b_in, *output)
    ctx.mark_non_differentiable(output[1])


def _encode_backward(ctx: Any, d_values: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    grads = _encode_grads_op(d_values, *ctx.saved_tensors, ctx.relu, ctx.backend, needs)
    pairs = zip(grads, needs, strict=True)
    return *(grad if need else None for grad, need in pairs), None, None, None, None


_encode_op.register_autograd(_encode_backward, setup_context=_keep_for_encode)


def _compiled_encode(
    x: Tensor,
    enc_rows: Tensor,
    b_enc: Tensor,
    b_in: Tensor | None,
    k: int,
    relu: bool,
    backend: str | None,
) -> TopKResult:
    """Encode by an operator, in the product's dtype of where it is called."""
    return TopKResult(*_encode_op(x, enc_rows, b_enc, b_in, k, relu, backend, product_dtype(x)))
