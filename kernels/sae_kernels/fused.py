"""A step of a sparse dictionary up to its gradients, without autograd and without padding.

    for each round of refining: read += rate * (x - decode(encode(read)))
    values, indices = encode(read)              the k largest of a row, or k * batch of the batch
    loss = scale * sum over prefixes p of share_p * sum over rows of ||x_hat_p - target||^2

Decoding, comparing and going back to the values is one kernel where there is one prefix and k is
the same in each row. The entries of all rounds are sorted by latent once, for both weights. Nothing
waits for the device, and no shape depends on what is in the tensors.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sae_kernels.decode import row_products, weighted_rows
from sae_kernels.encode import _keep_topk
from sae_kernels.grads import accumulator, product_and_square, sum_of
from sae_kernels.launch import (
    Backend,
    KernelError,
    Segments,
    check_floating,
    check_k,
    check_shape,
    choose,
    counts,
    rows_of,
)
from sae_kernels.mse import errors_of, pieces_of
from sae_kernels.product import Product, SelectedPre, centre
from sae_kernels.threshold import _keep_batch_topk


class StepWeights(NamedTuple):
    """A dictionary as a step reads it; the rows may be 16-bit copies of what is trained."""

    enc_rows: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_in: Float[Tensor, " d_in"] | None
    dec_rows: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]


class FusedStep(NamedTuple):
    """The gradients of all weights in float32, and what the step saw."""

    enc_rows: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_in: Float[Tensor, " d_in"]
    """Of what is subtracted from x; of nobody where nothing is."""
    dec_rows: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    x_hat: Float[Tensor, "batch d_out"]
    """The reconstruction by all latents."""
    row_loss: Float[Tensor, "batch prefix"]
    """The squared error of each row and prefix."""
    values: Float[Tensor, "batch k"] | Float[Tensor, " entry"]
    """What was kept, activations of 0 among it."""
    n_fired: Int[Tensor, " d_sae"]
    """In how many rows each latent fired."""
    squares: tuple[Float[Tensor, ""], Float[Tensor, ""]] | None
    """Squared norms of the gradients of enc_rows and dec_rows, where the kernels have them."""


class _Gradients(NamedTuple):
    """Those of all weights, and the squared norms of those of both matrices."""

    enc_rows: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_in: Float[Tensor, " d_in"]
    dec_rows: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    squares: tuple[Float[Tensor, ""], Float[Tensor, ""]] | None


class _Round(NamedTuple):
    """What one encoding kept, of which rows, and where the rows' entries end (CSR)."""

    x: Float[Tensor, "batch d_in"]
    values: Float[Tensor, "batch k"] | Float[Tensor, " entry"]
    indices: Int[Tensor, "batch k"] | Int[Tensor, " entry"]
    row_ptr: Int[Tensor, " bound"] | None

    def rows(self) -> Int[Tensor, " entry"]:
        """Name the batch row of each entry."""
        n = self.indices.numel()
        if self.row_ptr is not None:
            return rows_of(self.row_ptr, n)
        return torch.arange(n, device=self.indices.device) // max(1, self.indices.shape[1])


class _Terms(NamedTuple):
    """Entries with both their weights, and the rows of both products that they name."""

    indices: Int[Tensor, " entry"]
    values: Float[Tensor, " entry"]
    d_values: Float[Tensor, " entry"]
    out_at: Int[Tensor, " entry"]
    d_out: Float[Tensor, "piece d_out"]
    in_at: Int[Tensor, " entry"]
    x: Float[Tensor, "batch d_in"]


class _Pass(NamedTuple):
    """What does not change within a step."""

    weights: StepWeights
    k: int
    of_batch: bool
    backend: Backend

    def encode(self, read: Float[Tensor, "batch d_in"]) -> _Round:
        """Centre in float32, multiply in the rows' dtype, and keep what is largest."""
        rows, bias = self.weights.enc_rows, self.weights.b_enc
        x = centre(read, self.weights.b_in).to(rows.dtype)
        product = Product(x, rows, bias)
        keep: Any = partial(_keep_batch_topk if self.of_batch else _keep_topk, product, self.k)
        kept: SelectedPre = keep(relu=True, backend=self.backend)
        return _Round(x, *kept)

    def decode(self, kept: _Round) -> Float[Tensor, "batch d_out"]:
        """Reconstruct, in float32."""
        values, indices, row_ptr = kept[1:]
        rows = self.weights.dec_rows
        y = weighted_rows(values, indices, rows, row_ptr, self.backend, accumulator(rows.dtype))
        return y + self.weights.b_dec

    def along(
        self,
        d_y: Float[Tensor, "piece d_out"],
        kept: _Round,
        row_ptr: Int[Tensor, " piece_bound"] | None,
    ) -> Float[Tensor, "batch k"] | Float[Tensor, " entry"]:
        """Gradients of the values from those of what they add up to; a ReLU lets none below 0."""
        rows = self.weights.dec_rows
        indices = kept.indices if row_ptr is None else kept.indices.flatten()
        products = row_products(d_y.to(rows.dtype), rows, indices, row_ptr, self.backend)
        return products.view(kept.values.shape).masked_fill_(kept.values <= 0, 0.0)

    def back(
        self, d_values: Float[Tensor, "batch k"] | Float[Tensor, " entry"], kept: _Round
    ) -> Float[Tensor, "batch d_in"]:
        """Gradient of what was read from those of the values."""
        rows = self.weights.enc_rows
        dtype = accumulator(rows.dtype)
        return weighted_rows(d_values, kept.indices, rows, kept.row_ptr, self.backend, dtype)


class _Compared(NamedTuple):
    """The reconstruction, its errors, and their gradients: of each piece, and of each value."""

    x_hat: Float[Tensor, "batch d_out"]
    row_loss: Float[Tensor, "batch prefix"]
    d_pieces: Float[Tensor, "piece d_out"]
    d_values: Float[Tensor, "batch k"] | Float[Tensor, " entry"]
    bounds: Int[Tensor, " piece_bound"] | None


def _compared(
    step: _Pass,
    kept: _Round,
    target: Float[Tensor, "batch d_out"],
    ends: tuple[int, ...] | None,
    scales: tuple[float, ...],
) -> _Compared:
    rows, bias = step.weights.dec_rows, step.weights.b_dec
    if ends is None and kept.row_ptr is None and step.backend == "triton":
        from sae_kernels import decode_triton

        made = decode_triton.decode_mse(
            kept.values, kept.indices, rows, bias, target.contiguous(), scales[0], target.dtype
        )
        d_values = made.d_values.masked_fill_(kept.values <= 0, 0.0)
        return _Compared(made.x_hat, made.row_loss[:, None], made.grad_x_hat, d_values, None)
    bounds, values, indices = kept.row_ptr, kept.values, kept.indices
    if ends is not None:
        bounds = pieces_of(indices, ends, bounds)
        values, indices = values.flatten(), indices.flatten()
    pieces = weighted_rows(values, indices, rows, bounds, step.backend, accumulator(rows.dtype))
    x_hat, row_loss, d_pieces = errors_of(pieces, bias, target, scales)
    d_values = step.along(d_pieces, kept, bounds)
    return _Compared(x_hat, row_loss, d_pieces.to(rows.dtype), d_values, bounds)


def _joined(parts: list[Shaped[Tensor, "..."]]) -> Shaped[Tensor, "..."]:
    """Put tensors behind each other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _summed_rows(
    weights: Float[Tensor, " d_sae"], rows: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, " d_in"]:
    """Compute `weights @ rows` in the dtype of the weights, without a wider copy of the rows."""
    if rows.dtype == weights.dtype or not rows.is_cuda:
        return weights @ rows.to(weights.dtype)
    high = weights.to(rows.dtype)
    both = torch.stack([high, (weights - high).to(rows.dtype)])  # what the rounding took off
    return torch.mm(both, rows, out_dtype=weights.dtype).sum(0)


def _gradients(
    step: _Pass,
    terms: list[_Terms],
    d_first: Float[Tensor, "batch d_out"],
    on_decoder: Callable[[Tensor], None] | None,
) -> _Gradients:
    """Sum up over all entries, which are sorted by latent once."""
    d_out, x = (_joined([part[i] for part in terms]) for i in (4, 6))
    n_out, n_in, out_at, in_at = 0, 0, [], []
    for part in terms:
        out_at.append(part.out_at + n_out)
        in_at.append(part.in_at + n_in)
        n_out, n_in = n_out + len(part.d_out), n_in + len(part.x)
    indices, values, d_values = (_joined([part[i].flatten() for part in terms]) for i in range(3))
    d_sae = len(step.weights.enc_rows)
    latents, order = torch.sort(indices.int(), stable=True)
    lengths = counts(indices, d_sae)
    reads = Segments(latents, order, _joined(in_at)[order], lengths, lengths.cumsum(0) - lengths)
    writes = reads._replace(rows=_joined(out_at)[order])
    d_b_enc = sum_of(reads, d_values)
    d_dec, square_dec = product_and_square(writes, values, d_out, step.backend)
    if on_decoder is not None:
        on_decoder(d_dec)
    d_enc, square_enc = product_and_square(reads, d_values, x, step.backend)
    d_b_in = -_summed_rows(d_b_enc, step.weights.enc_rows)  # the sum of -d_x
    d_b_dec = d_first.sum(0, dtype=d_b_enc.dtype)
    squares = None
    if square_enc is not None and square_dec is not None:
        squares = (square_enc, square_dec)
    return _Gradients(d_enc, d_b_enc, d_b_in, d_dec, d_b_dec, squares)


def _terms(kept: _Round, found: _Compared, has_pieces: bool) -> _Terms:
    """Entries of what is compared; with prefixes each belongs to a piece of its row."""
    rows = pieces = kept.rows()
    if has_pieces and found.bounds is not None:
        pieces = rows_of(found.bounds, len(rows))
    entries = (kept.indices, kept.values, found.d_values)
    return _Terms(*entries, pieces, found.d_pieces, rows, kept.x)


def _checked(
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    weights: StepWeights,
    k: int,
    n_rounds: int,
) -> None:
    """Refuse tensors that do not fit each other."""
    check_floating(x=x, target=target, b_enc=weights.b_enc, b_in=weights.b_in, b_dec=weights.b_dec)
    check_floating(enc_rows=weights.enc_rows, dec_rows=weights.dec_rows)
    check_shape("enc_rows", weights.enc_rows, None, None)
    check_shape("x", x, None, weights.enc_rows.shape[1])
    check_shape("b_enc", weights.b_enc, len(weights.enc_rows))
    check_shape("b_in", weights.b_in, x.shape[1])
    check_shape("dec_rows", weights.dec_rows, len(weights.enc_rows), target.shape[1])
    check_shape("b_dec", weights.b_dec, target.shape[1])
    check_shape("target", target, len(x), None)
    check_k(k, len(weights.enc_rows))
    if n_rounds and x.shape != target.shape:
        raise KernelError(
            f"target must have the shape of x to be refined, {tuple(x.shape)}, got "
            f"{tuple(target.shape)}"
        )


@torch.no_grad()
def fused_topk_step(  # noqa: PLR0913
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    weights: StepWeights,
    k: int,
    *,
    scale: float,
    of_batch: bool = False,
    prefixes: Sequence[int] | None = None,
    shares: Sequence[float] = (1.0,),
    rounds: Sequence[float] = (),
    backend: str | None = None,
    on_decoder: Callable[[Tensor], None] | None = None,
) -> FusedStep:
    """Encode, decode, compare and go back, of a TopK or BatchTopK dictionary.

    Args:
        x: what is read (batch, d_in), in float32 (float64 for the torch backend).
        target: what is predicted (batch, d_out).
        weights: the dictionary; with rows of bfloat16 the other tensors stay in float32.
        k: latents kept of each row, or of a row on average.
        scale: of the loss, 1 / batch for the mean over rows.
        of_batch: keep the k * batch largest of the batch (BatchTopK).
        prefixes: ends of the prefixes, rising up to d_sae; by default all latents alone.
        shares: weight of each prefix in the loss.
        rounds: rate of each round in which the rows are refined before.
        backend: a forced backend; the fastest one by default.
        on_decoder: called with the gradient of dec_rows before that of enc_rows is made, so that
            other processes' can be added to it meanwhile.

    Raises:
        ValueError: if shapes, devices, k or the backend do not fit.
        TypeError: if the tensors are not floating point or differ in dtype.
    """
    _checked(x, target, weights, k, len(rounds))
    name = choose(x, backend)
    step = _Pass(weights, k, of_batch, "torch" if name == "reference" else name)
    with torch.autocast(x.device.type, enabled=False):
        read, earlier = x, []
        for rate in rounds:
            earlier.append(step.encode(read))
            read = read + rate * (x - step.decode(earlier[-1]))
        kept = step.encode(read)
        ends = None if prefixes is None else tuple(prefixes)
        found = _compared(step, kept, target, ends, tuple(scale * share for share in shares))
        terms = [_terms(kept, found, ends is not None)]
        d_first = found.d_pieces.unflatten(0, (len(x), -1))[:, 0]
        d_read = step.back(found.d_values, kept) if earlier else x
        for rate, old in zip(reversed(rounds), reversed(earlier), strict=True):
            d_y = -rate * d_read
            d_values = step.along(d_y, old, old.row_ptr)
            rows = old.rows()
            low = d_y.to(weights.dec_rows.dtype)
            terms.append(_Terms(old.indices, old.values, d_values, rows, low, rows, old.x))
            d_first = d_first + d_y
            d_read = d_read + step.back(d_values, old) if old is not earlier[0] else d_read
        grads = _gradients(step, terms, d_first, on_decoder)
    fired = counts(kept.indices, len(weights.enc_rows), kept.values > 0)
    seen = (found.x_hat, found.row_loss, kept.values, fired)
    return FusedStep(*grads[:-1], *seen, grads.squares)
