"""Encoders whose rows keep as many latents as pass: JumpReLU's threshold, and BatchTopK.

What passes is stored row after row (CSR): `Csr.values` and `Csr.indices` hold the entries, and row
n has those from `row_ptr[n]` to `row_ptr[n + 1]`.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kernels.grads import accumulator
from sae_kernels.launch import Backend, check_floating, check_k, check_shape, choose
from sae_kernels.product import (
    Encode,
    Product,
    SelectedPre,
    SelectionRule,
    check_encoder,
    dense_pre,
)
from sae_kernels.select import topk_select


class Csr(NamedTuple):
    """Sparse latents with any number of entries a row; latents ascend within a row."""

    values: Float[Tensor, " entry"]
    indices: Int[Tensor, " entry"]
    row_ptr: Int[Tensor, " bound"]


def _bounds(lengths: Int[Tensor, " batch"]) -> Int[Tensor, " bound"]:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _csr(pre: Float[Tensor, "batch d_sae"], flat: Int[Tensor, " entry"], relu: bool) -> Csr:
    """Look the entries at ascending places of the flattened pre-activations up."""
    batch, d_sae = pre.shape
    values = pre.flatten().index_select(0, flat)
    lengths = torch.bincount(flat // d_sae, minlength=batch)
    return Csr(values.relu() if relu else values, flat % d_sae, _bounds(lengths))


def _passing(
    pre: Float[Tensor, "batch d_sae"], threshold: Float[Tensor, "*d_sae"]
) -> Int[Tensor, " entry"]:
    """Name what is above the threshold, or NaN, by its place in the flattened `pre`."""
    return (~(pre <= threshold)).flatten().nonzero().squeeze(1)


def _by_row(
    values: Float[Tensor, " entry"], places: Int[Tensor, " entry"], product: Product
) -> SelectedPre:
    """Part the places in the flattened batch into rows and latents, without a wait."""
    batch, d_sae = len(product.x), len(product.bias)
    bounds = torch.arange(batch + 1, device=places.device) * d_sae
    return SelectedPre(values, places % d_sae, torch.searchsorted(places, bounds))


def _keep_passing(
    product: Product, threshold: Float[Tensor, "*d_sae"], backend: Backend
) -> SelectedPre:
    if backend == "triton":
        from sae_kernels import encode_triton

        operands = encode_triton.Operands(*(t.contiguous() for t in product))
        return _by_row(*encode_triton.encode_threshold(operands, threshold), product)
    parts = [_csr(pre, _passing(pre, threshold), False) for _, pre in product.chunks()]
    return _joined(parts, product)


def _joined(parts: list[Csr], product: Product) -> SelectedPre:
    """Put the chunks' entries behind each other."""
    bias = product.bias
    lengths = [part.row_ptr.diff() for part in parts]
    none = torch.zeros(0, dtype=torch.int64, device=bias.device)
    return SelectedPre(
        torch.cat([bias[:0], *(part.values for part in parts)]),
        torch.cat([none, *(part.indices for part in parts)]),
        _bounds(torch.cat([none, *lengths])),
    )


def encode_threshold(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"] | Float[Tensor, ""] | float,
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
    backend: str | None = None,
) -> Csr:
    """Encode and keep every pre-activation above its latent's threshold, without storing them all.

    `pre = (x - b_in) @ enc_rows.T + b_enc`; an entry is kept with the value `pre` where
    `pre > threshold` (JumpReLU, arXiv 2407.14435) or where it is NaN. The values are
    differentiable once in x, enc_rows, b_enc and b_in; the threshold has no gradient here. Dtypes
    and autocast are as in `encode_topk`.

    Args:
        x: activations (batch, d_in).
        enc_rows: one row per latent (d_sae, d_in).
        b_enc: bias (d_sae,).
        threshold: one per latent (d_sae,), or one for all, as BatchTopK has at inference.
        b_in: what is subtracted from x (d_in,).
        backend: a forced backend; the fastest one by default.

    Returns:
        values in float32 (float64 for float64), int64 indices and int64 row_ptr (batch + 1,).

    Raises:
        ValueError: if shapes, devices or the backend do not fit.
        TypeError: if the tensors are not floating point or differ in dtype.
    """
    check_encoder(x, enc_rows, b_enc, b_in)
    if isinstance(threshold, Tensor):
        check_floating(x=x, threshold=threshold.to(x.dtype))
        if threshold.dim():
            check_shape("threshold", threshold, len(enc_rows))
    limit = torch.as_tensor(threshold, dtype=accumulator(x.dtype), device=x.device).detach()
    name = choose(x, backend)
    if name == "reference":
        pre = dense_pre(x, enc_rows, b_enc, b_in)
        return _csr(pre, _passing(pre.detach(), limit), False)
    rule = SelectionRule(partial(_keep_passing, threshold=limit, backend=name), False, name)
    return Csr(*Encode.apply(x, enc_rows, b_enc, b_in, rule))


def _best(
    pre: Float[Tensor, "batch d_sae"], n_selected: int, backend: Backend
) -> Int[Tensor, " k"]:
    """Name the n_selected largest by their places in the flattened `pre`, which settle ties."""
    backend = "reference" if backend == "reference" else "torch"
    return topk_select(pre.detach().reshape(1, -1), n_selected, backend=backend).indices[0]


def batch_topk(
    pre: Float[Tensor, "batch d_sae"],
    k: int,
    *,
    relu: bool = True,
    backend: str | None = None,
) -> Csr:
    """Take the k * batch largest of the whole batch (BatchTopK, arXiv 2412.06410), exactly.

    Value descending, on equal values row and then index ascending. -0 equals +0; NaN is larger
    than every number. The values carry a gradient to `pre`.

    Args:
        pre: pre-activations (batch, d_sae) of any floating dtype.
        k: how many a row on average, 1 <= k <= d_sae.
        relu: clamp the values at 0; what is kept is the same.
        backend: a forced backend; the fastest one by default.

    Returns:
        k * batch values in the dtype of `pre`, int64 indices, and int64 row_ptr (batch + 1,).

    Raises:
        ValueError: if `pre` is not two-dimensional, or k or the backend are out of range.
        TypeError: if `pre` is not floating point.
    """
    check_shape("pre", pre, None, None)
    check_floating(pre=pre)
    check_k(k, pre.shape[1])
    name = choose(pre, backend)
    if not len(pre):
        return _csr(pre, torch.zeros(0, dtype=torch.int64, device=pre.device), relu)
    return _csr(pre, _best(pre, k * len(pre), name), relu)


class _BestEntries(NamedTuple):
    """The best entries so far, by row and latent."""

    values: Float[Tensor, " entry"]
    rows: Int[Tensor, " entry"]
    indices: Int[Tensor, " entry"]


def _keep_batch_topk(product: Product, k: int, relu: bool, backend: Backend) -> SelectedPre:
    """Keep the best of the batch so far; a later chunk adds only what is above the worst of them.

    An equal value of a later row loses, so that nothing else can belong to the answer.
    """
    if backend == "triton":
        from sae_kernels import encode_triton

        operands = encode_triton.Operands(*(t.contiguous() for t in product))
        values, places = encode_triton.encode_batch_topk(operands, k * len(product.x))
        return _by_row(values.relu() if relu else values, places, product)
    n_selected, bias = k * len(product.x), product.bias
    none = torch.zeros(0, dtype=torch.int64, device=bias.device)
    best, worst = _BestEntries(bias[:0], none, none), -math.inf
    for rows, pre in product.chunks():
        full = len(best.values) == n_selected
        flat = (~(pre <= worst)).flatten().nonzero().squeeze(1) if full else None
        if flat is None:
            flat = _best(pre, min(n_selected, pre.numel()), backend)
        new = pre.flatten().index_select(0, flat)
        result = _BestEntries(new, flat // len(bias) + rows.start, flat % len(bias))
        best = _BestEntries(*(torch.cat(pair) for pair in zip(best, result, strict=True)))
        if len(best.values) > n_selected:
            picked = _best(best.values[None], n_selected, backend)
            best = _BestEntries(*(part[picked] for part in best))
        # NaN is above every number, so it is no bound
        worst = float(best.values.nan_to_num(math.inf, math.inf, -math.inf).min())
    lengths = torch.bincount(best.rows, minlength=len(product.x))
    return SelectedPre(best.values.relu() if relu else best.values, best.indices, _bounds(lengths))


def encode_batch_topk(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
    relu: bool = True,
    backend: str | None = None,
) -> Csr:
    """Encode and keep the k * batch largest pre-activations, without storing them all.

    The rule is that of `batch_topk`, the arithmetic, gradients and dtypes are those of
    `encode_topk`, and so are the arguments; k is how many a row on average.

    Returns:
        k * batch values in float32 (float64 for float64), int64 indices and row_ptr (batch + 1,).

    Raises:
        ValueError: if shapes, devices, k or the backend do not fit.
        TypeError: if the tensors are not floating point or differ in dtype.
    """
    check_encoder(x, enc_rows, b_enc, b_in)
    check_k(k, len(enc_rows))
    name = choose(x, backend)
    if name == "reference":
        return batch_topk(dense_pre(x, enc_rows, b_enc, b_in), k, relu=relu, backend=name)
    rule = SelectionRule(partial(_keep_batch_topk, k=k, relu=relu, backend=name), relu, name)
    return Csr(*Encode.apply(x, enc_rows, b_enc, b_in, rule))
