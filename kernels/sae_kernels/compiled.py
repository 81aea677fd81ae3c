"""The ops as `torch.compile` sees them: opaque, with shapes for its tracing and with gradients.

The public functions import this module while they are compiled, and never otherwise: the import
registers the operators, and eager calls are spared torch's dispatcher. Arguments are checked when
the compiled code runs, by the same public functions, which the operators call. Their annotations
are bare tensors, because torch reads the operators' schemas from them.
"""

# ruff: noqa: PLR0913  (an operator takes each tensor and number as an argument of its own)

from typing import Any

import torch
from torch import Tensor

from sae_kernels.decode import row_products, sparse_decode
from sae_kernels.encode import encode_topk
from sae_kernels.grads import Entries, accumulator, segment_product
from sae_kernels.launch import choose
from sae_kernels.product import Kept, Rule, encoder_grads, product_dtype
from sae_kernels.select import TopK, topk_select


@torch.library.custom_op("sae_kernels::select", mutates_args=())
def _select(pre: Tensor, k: int, by_value: bool, backend: str | None) -> Tensor:
    return topk_select(pre, k, relu=False, sorted=by_value, backend=backend).indices


@_select.register_fake
def _(pre: Tensor, k: int, *_: Any) -> Tensor:
    return pre.new_empty(pre.shape[0], k, dtype=torch.int64)


def compiled_select(pre: Tensor, k: int, relu: bool, by_value: bool, backend: str | None) -> TopK:
    """Select by an operator, and gather the values, which has a gradient."""
    indices = _select(pre.detach(), k, by_value, backend)
    values = pre.gather(1, indices)
    return TopK(values.relu() if relu else values, indices)


@torch.library.custom_op("sae_kernels::encode", mutates_args=())
def _encode(
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
        found = encode_topk(x, enc_rows, b_enc, k, b_in=b_in, relu=relu, backend=backend)
    return found.values, found.indices


@_encode.register_fake
def _(x: Tensor, _rows: Tensor, _bias: Tensor, _b_in: Tensor | None, k: int, *_: Any) -> Any:
    shape = (x.shape[0], k)
    values = x.new_empty(shape, dtype=accumulator(x.dtype))
    return values, x.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("sae_kernels::encode_grads", mutates_args=())
def _encode_grads(
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
    rule = Rule(lambda _: Kept(values, indices), relu, choose(x, backend))
    grads = encoder_grads(d_values, (x, enc_rows, b_in), Kept(values, indices), rule, tuple(needs))
    pairs = zip(grads, needs, strict=True)
    return [x.new_empty(0) if g is None or not need else g for g, need in pairs]


@_encode_grads.register_fake
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
    grads = _encode_grads(d_values, *ctx.saved_tensors, ctx.relu, ctx.backend, needs)
    pairs = zip(grads, needs, strict=True)
    return *(grad if need else None for grad, need in pairs), None, None, None, None


_encode.register_autograd(_encode_backward, setup_context=_keep_for_encode)


def compiled_encode(
    x: Tensor,
    enc_rows: Tensor,
    b_enc: Tensor,
    b_in: Tensor | None,
    k: int,
    relu: bool,
    backend: str | None,
) -> TopK:
    """Encode by an operator, in the product's dtype of where it is called."""
    return TopK(*_encode(x, enc_rows, b_enc, b_in, k, relu, backend, product_dtype(x)))


@torch.library.custom_op("sae_kernels::decode", mutates_args=())
def _decode(values: Tensor, indices: Tensor, dec_rows: Tensor, backend: str | None) -> Tensor:
    return sparse_decode(values, indices, dec_rows, backend=backend)


@_decode.register_fake
def _(values: Tensor, _indices: Tensor, dec_rows: Tensor, *_: Any) -> Tensor:
    return dec_rows.new_empty(values.shape[0], dec_rows.shape[1])


@torch.library.custom_op("sae_kernels::decode_grads", mutates_args=())
def _decode_grads(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    dec_rows: Tensor,
    backend: str | None,
    needs: list[bool],
) -> list[Tensor]:
    name, indices = choose(values, backend), indices.long()
    d_values = d_rows = values.new_empty(0)
    if needs[0]:
        d_values = row_products(grad, dec_rows, indices, backend=name).to(values.dtype)
    if needs[1]:
        entries = Entries(indices, len(dec_rows))
        d_rows = segment_product(entries, values, grad, name).to(dec_rows.dtype)
    return [d_values, d_rows]


@_decode_grads.register_fake
def _(_grad: Tensor, values: Tensor, _indices: Tensor, dec_rows: Tensor, *rest: Any) -> Any:
    needs = rest[-1]
    pairs = zip((values, dec_rows), needs, strict=True)
    return [t.new_empty(t.shape) if need else values.new_empty(0) for t, need in pairs]


def _keep_for_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    d_values, d_rows = _decode_grads(grad, *ctx.saved_tensors, ctx.backend, needs)
    return d_values if needs[0] else None, None, d_rows if needs[1] else None, None


_decode.register_autograd(_decode_backward, setup_context=_keep_for_decode)


def compiled_decode(
    values: Tensor, indices: Tensor, dec_rows: Tensor, b_dec: Tensor | None, backend: str | None
) -> Tensor:
    """Decode by an operator, and add the bias."""
    x_hat = _decode(values, indices, dec_rows, backend)
    return x_hat if b_dec is None else x_hat + b_dec
