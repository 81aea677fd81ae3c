"""Reconstruction, squared error and their gradients in one op, for one prefix or several.

Matryoshka dictionaries (arXiv 2503.17547) ask every prefix of the latents for a reconstruction.
Latents ascend within a row, so the prefixes cut a row's entries into consecutive pieces. Each piece
is decoded once; a prefix's reconstruction is the sum of the pieces up to it, and the gradient of a
piece is the sum of the errors from its prefix on.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_kernels.decode import (
    check_row_ptr,
    row_products,
    sparse_decode_reference,
    weighted_rows,
)
from sae_kernels.grads import accumulator, segment_product
from sae_kernels.launch import (
    Backend,
    Entries,
    KernelError,
    check_floating,
    check_indices,
    check_shape,
    choose,
    on_device,
    rows_of,
)


class DecodeLoss(NamedTuple):
    """The loss, which alone has gradients, and what it was made from."""

    loss: Float[Tensor, ""]
    x_hat: Float[Tensor, "batch d_out"]
    row_loss: Float[Tensor, "batch prefix"]


class _Options(NamedTuple):
    scale: float
    ends: tuple[int, ...] | None
    backend: Backend


class _Errors(NamedTuple):
    """The reconstruction, the error of each row and prefix, and the gradient of each piece."""

    x_hat: Float[Tensor, "batch d_out"]
    row_loss: Float[Tensor, "batch prefix"]
    d_pieces: Float[Tensor, "piece d_out"]


def sparse_decode_mse_reference(  # noqa: PLR0913
    values: Float[Tensor, "batch k"] | Float[Tensor, " entry"],
    indices: Int[Tensor, "batch k"] | Int[Tensor, " entry"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"] | None,
    target: Float[Tensor, "batch d_out"],
    scale: float,
    ends: tuple[int, ...],
    row_ptr: Int[Tensor, " bound"] | None = None,
) -> DecodeLoss:
    """Decode each prefix by itself and compare; for torch's own autograd."""
    dtype = accumulator(dec_rows.dtype)
    x_hat, errors = target, []
    for end in ends:
        x_hat = sparse_decode_reference(values * (indices < end), indices, dec_rows, row_ptr)
        x_hat = x_hat if b_dec is None else x_hat + b_dec
        errors.append((x_hat.to(dtype) - target.to(dtype)).square().sum(1))
    row_loss = torch.stack(errors, 1)
    return DecodeLoss(scale * row_loss.sum(), x_hat.detach(), row_loss.detach())


def pieces_of(
    indices: Int[Tensor, "batch k"] | Int[Tensor, " entry"],
    ends: tuple[int, ...],
    row_ptr: Int[Tensor, " bound"] | None,
) -> Int[Tensor, " piece_bound"]:
    """Bound the entries of each row and prefix, in the order of the entries."""
    if row_ptr is not None:  # entries of later rows have larger keys
        d_sae = ends[-1]
        starts = torch.arange(len(row_ptr) - 1, device=indices.device)[:, None] * d_sae
        keys = rows_of(row_ptr, len(indices)) * d_sae + indices
        limits = starts + on_device(ends, indices.device)
        return torch.nn.functional.pad(torch.searchsorted(keys, limits).flatten(), (1, 0))
    batch, k = indices.shape
    limits = on_device(ends, indices.device).expand(batch, -1).contiguous()
    stops = torch.searchsorted(indices.contiguous(), limits)
    stops += torch.arange(batch, device=indices.device)[:, None] * k
    return torch.nn.functional.pad(stops.flatten(), (1, 0))


def errors_of(
    pieces: Float[Tensor, "piece d_out"],
    b_dec: Float[Tensor, " d_out"] | None,
    target: Float[Tensor, "batch d_out"],
    scales: tuple[float, ...],
) -> _Errors:
    """Add the pieces of each row up, compare with the target, and add the errors up backwards.

    The errors count by the scales of their prefixes.
    """
    n_prefixes, dtype = len(scales), accumulator(pieces.dtype)
    x_hat = pieces.unflatten(0, (len(target), n_prefixes))
    x_hat = x_hat.cumsum(1, dtype=dtype).to(pieces.dtype) if n_prefixes > 1 else x_hat
    x_hat = x_hat if b_dec is None else x_hat + b_dec
    error = x_hat.to(dtype) - target.to(dtype)[:, None]
    row_loss = torch.linalg.vector_norm(error, dim=2).square_()
    if len(set(scales)) == 1:
        error *= 2 * scales[0]
    else:
        error *= 2 * on_device(scales, error.device).to(dtype)[:, None]
    if n_prefixes > 1:
        error = error.flip(1).cumsum(1).flip(1)
    return _Errors(x_hat[:, -1], row_loss, error.flatten(0, 1))


class _DecodeMse(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        values: Float[Tensor, "batch k"] | Float[Tensor, " entry"],
        indices: Int[Tensor, "batch k"] | Int[Tensor, " entry"],
        dec_rows: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"] | None,
        target: Float[Tensor, "batch d_out"],
        row_ptr: Int[Tensor, " bound"] | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale, ends, backend = options
        shape = values.shape
        d_values = None
        if backend == "triton" and ends is None and row_ptr is None:
            from sae_kernels import decode_triton

            bias = None if b_dec is None else b_dec.contiguous()
            x_hat, row_loss, d_pieces, d_values = decode_triton.decode_mse(
                values.contiguous(),
                indices.contiguous(),
                dec_rows.contiguous(),
                bias,
                target.contiguous(),
                scale,
            )
            row_loss = row_loss[:, None]
        else:
            if ends is not None:
                row_ptr = pieces_of(indices, ends, row_ptr)
                values, indices = values.flatten(), indices.flatten()
            pieces = weighted_rows(values, indices, dec_rows, row_ptr, backend)
            x_hat, row_loss, d_pieces = errors_of(
                pieces, b_dec, target, (scale,) * len(ends or [0])
            )
            if ctx.needs_input_grad[0]:
                low = d_pieces.to(dec_rows.dtype)
                d_values = row_products(low, dec_rows, indices, row_ptr, backend)
        ctx.save_for_backward(values, indices, dec_rows, row_ptr, d_pieces, d_values)
        ctx.options, ctx.shape, ctx.target = options, shape, (len(target), target.dtype)
        ctx.mark_non_differentiable(x_hat, row_loss)
        return scale * row_loss.sum(), x_hat, row_loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_loss: Float[Tensor, ""], *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        values, indices, dec_rows, row_ptr, d_pieces, d_values = ctx.saved_tensors
        needs_values, _, needs_rows, needs_bias, needs_target = ctx.needs_input_grad[:5]
        d_rows = d_bias = d_target = None
        if needs_values:
            d_values = (d_values * d_loss).to(values.dtype).view(ctx.shape)
        if needs_rows:
            entries = Entries(indices, len(dec_rows), row_ptr)
            d_rows = segment_product(entries, values * d_loss, d_pieces, ctx.options.backend)
            d_rows = d_rows.to(dec_rows.dtype)
        if needs_bias or needs_target:  # the first piece is part of every prefix
            batch, dtype = ctx.target
            n_prefixes = len(ctx.options.ends or [0])
            first = d_pieces.unflatten(0, (batch, n_prefixes))[:, 0] * d_loss
            d_bias = first.sum(0).to(dec_rows.dtype) if needs_bias else None
            d_target = -first.to(dtype) if needs_target else None
        return d_values if needs_values else None, None, d_rows, d_bias, d_target, None, None


def _check_prefixes(
    prefixes: Sequence[int],
    indices: Int[Tensor, "batch k"] | Int[Tensor, " entry"],
    row_ptr: Int[Tensor, " bound"] | None,
    d_sae: int,
) -> None:
    ends = list(prefixes)
    rises = all(low < high for low, high in zip([0, *ends], ends, strict=False))
    if not ends or not rises or ends[-1] != d_sae:
        raise KernelError(
            f"prefixes must rise from at least 1 to d_sae={d_sae}, got {ends}; the last prefix is "
            "the whole dictionary"
        )
    falls = indices.diff(dim=-1) < 0
    if row_ptr is not None:  # where a row begins it may
        falls &= rows_of(row_ptr, len(indices)).diff() == 0
    if indices.device.type == "cpu" and bool(falls.any()):
        raise KernelError(
            "indices must ascend within a row for prefixes, got some that fall; sort them as "
            "topk_select does without `sorted`"
        )


def sparse_decode_mse(  # noqa: PLR0913
    values: Float[Tensor, "batch k"] | Float[Tensor, " entry"],
    indices: Int[Tensor, "batch k"] | Int[Tensor, " entry"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"] | None,
    target: Float[Tensor, "batch d_out"],
    *,
    scale: float,
    prefixes: Sequence[int] | None = None,
    row_ptr: Int[Tensor, " bound"] | None = None,
    backend: str | None = None,
) -> DecodeLoss:
    """Decode and compare with the target, and compute the gradients in the same pass.

    `loss = scale * sum over rows and prefixes of ||x_hat - target||^2`, where the x_hat of a prefix
    is `values @ dec_rows[indices] + b_dec` over the latents below its end. The loss is
    differentiable once in values, dec_rows, b_dec and target; x_hat and row_loss carry no gradient.

    Args:
        values: latents (batch, k), dtypes as in `sparse_decode`.
        indices: latents (batch, k) in 0..d_sae-1; ascending where prefixes are given.
        dec_rows: one row per latent (d_sae, d_out).
        b_dec: bias (d_out,) of every prefix.
        target: what is reconstructed (batch, d_out).
        scale: factor of the loss, 1 / batch for the mean over rows.
        prefixes: ends of the prefixes, rising up to d_sae; by default all latents alone.
        row_ptr: bounds of the rows' entries, where values and indices are (entry,).
        backend: a forced backend; the fastest one by default.

    Returns:
        loss; x_hat of all latents in the dtype of `dec_rows`; row_loss, errors without `scale`.

    Raises:
        ValueError: if shapes, devices, indices, prefixes or the backend do not fit.
    """
    for one in ({"values": values}, {"dec_rows": dec_rows, "b_dec": b_dec}, {"target": target}):
        check_floating(**one)
    if values.dtype != accumulator(dec_rows.dtype):
        check_floating(values=values, dec_rows=dec_rows)
    check_shape("values", values, *([None] if row_ptr is not None else [None, None]))
    check_shape("indices", indices, *values.shape)
    check_shape("dec_rows", dec_rows, None, None)
    d_sae, d_out = dec_rows.shape
    check_shape("b_dec", b_dec, d_out)
    check_shape("target", target, len(values) if row_ptr is None else len(row_ptr) - 1, d_out)
    check_indices(indices, d_sae)
    if row_ptr is not None:
        check_row_ptr(row_ptr, len(values))
        row_ptr = row_ptr.long()
    if prefixes is not None:
        _check_prefixes(prefixes, indices, row_ptr, d_sae)
    ends = None if prefixes is None else tuple(prefixes)
    with torch.autocast(values.device.type, enabled=False):
        name = choose(values, backend)
        if name == "reference":
            return sparse_decode_mse_reference(
                values, indices, dec_rows, b_dec, target, scale, ends or (d_sae,), row_ptr
            )
        given = (values, indices.long(), dec_rows, b_dec, target, row_ptr)
        return DecodeLoss(*_DecodeMse.apply(*given, _Options(scale, ends, name)))
