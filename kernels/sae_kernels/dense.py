"""Autoencoders with dense latents, ReLU or JumpReLU, differentiated by hand.

    pre = (x - b_in) @ enc_rows.T + b_enc
    acts = pre where pre > threshold, else 0            (the ReLU has the threshold 0)
    x_hat = acts @ dec_rows + b_dec
    l1 = mean over rows of sum_j acts_j |dec_rows_j|    (Scaling Monosemanticity, 2024)
    l0 = mean over rows of the number of acts != 0

Five products with (batch, d_sae) are the floor of a step. The rest is done while some rows of them
are in the cache, and one (batch, d_sae) matrix is held: the activations, or, for JumpReLU, whose
threshold learns from what lies just below it, the pre-activations.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_kernels.launch import KernelError, check_floating, check_shape, choose, workspace

CHUNK_BYTES = 1 << 24  # of (batch, d_sae) worked on at a time on a CPU


class DenseStep(NamedTuple):
    """The reconstruction and the penalties; `n_fired` counts the rows that each latent fired in."""

    x_hat: Float[Tensor, "batch d_out"]
    l1: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    n_fired: Int[Tensor, " d_sae"]


def dense_autoencode_reference(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
    threshold: Float[Tensor, " d_sae"] | None,
    bandwidth: float,
) -> DenseStep:
    """Write the equations out for torch's autograd; terms of value 0 carry pseudo-gradients."""
    pre = x @ enc_rows.T + b_enc
    fires = ~(pre <= (0.0 if threshold is None else threshold))
    acts, n_active = torch.where(fires, pre, 0.0), fires.to(pre.dtype)
    if threshold is not None:
        fixed = threshold.detach()
        moved = _window(pre.detach(), fixed, bandwidth) / bandwidth * (threshold - fixed)
        acts, n_active = acts - fixed * moved, n_active - moved
    rows = max(1, len(x))
    l1 = (acts @ dec_rows.norm(dim=1)).sum() / rows
    fired = (acts.detach() != 0).sum(0)
    return DenseStep(acts @ dec_rows + b_dec, l1, n_active.sum() / rows, fired)


def _window(
    pre: Float[Tensor, "batch d_sae"], threshold: Float[Tensor, " d_sae"], bandwidth: float
) -> Float[Tensor, "batch d_sae"]:
    """Tell what is so near to its threshold that the threshold learns from it."""
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


def _chunks(spare: Float[Tensor, "batch d_sae"]) -> list[slice]:
    """Cut the batch into rows worked on at a time, by the device's measure."""
    batch, d_sae = spare.shape
    n_rows = max(1, workspace(spare.device, CHUNK_BYTES) // max(1, d_sae * spare.element_size()))
    return [slice(start, min(start + n_rows, batch)) for start in range(0, batch, n_rows)]


def _spaces(spare: Tensor, chunks: list[slice], n: int) -> list[Tensor]:
    """Make working memory of the size of a chunk, n times."""
    return [spare.new_empty(chunks[0].stop if chunks else 0, spare.shape[1]) for _ in range(n)]


def _into(
    out: Float[Tensor, "a c"],
    left: Float[Tensor, "a b"],
    right: Float[Tensor, "b c"],
    bias: Float[Tensor, " c"] | None = None,
) -> Float[Tensor, "a c"]:
    """Write a product of operands of one dtype into `out`, where it is summed, and add the bias."""
    if left.dtype == out.dtype:
        if bias is None:
            return torch.mm(left, right, out=out)
        return torch.addmm(bias, left, right, out=out)
    if left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:  # a CPU sums products of bfloat16 in bfloat16 only
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)
    return out if bias is None else out.add_(bias)


def _add_product(
    total: Float[Tensor, "a c"], left: Float[Tensor, "a b"], right: Float[Tensor, "b c"]
) -> None:
    """Add a product to what is there; of operands of fewer bits it is first summed by itself."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(_into(torch.empty_like(total), left, right))


class _Grads(NamedTuple):
    """Sums over the chunks, None where they are not asked for; x has its rows written instead."""

    x: Float[Tensor, "batch d_in"] | None
    enc_rows: Float[Tensor, "d_sae d_in"] | None
    b_enc: Float[Tensor, " d_sae"]
    dec_rows: Float[Tensor, "d_sae d_out"] | None
    threshold: Float[Tensor, " d_sae"] | None


class _DenseStep(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        x: Float[Tensor, "batch d_in"],
        enc_rows: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        dec_rows: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"],
        threshold: Float[Tensor, " d_sae"] | None,
        bandwidth: float,
        low: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, d_sae = len(x), len(enc_rows)
        few, encoder, decoder = x.to(low), enc_rows.to(low).T, dec_rows.to(low)
        spare, x_hat = x.new_empty(batch, d_sae), x.new_empty(batch, dec_rows.shape[1])
        total, fired = torch.zeros_like(b_enc), torch.zeros_like(b_enc)
        chunks = _chunks(spare)
        space = _spaces(spare, chunks, 2)
        for rows in chunks:
            pre = _into(spare[rows], few[rows], encoder, b_enc)
            acts, fires = (part[: len(pre)] for part in space)
            if threshold is None:
                acts = pre.relu_()
            else:
                torch.mul(pre, torch.gt(pre, threshold, out=fires), out=acts)  # NaN stays NaN
            total += acts.sum(0)
            _into(x_hat[rows], acts.to(low), decoder, b_dec)
            fired += torch.ne(acts, 0, out=fires).sum(0)
        ctx.save_for_backward(x, enc_rows, dec_rows, threshold, spare, total)
        ctx.bandwidth, ctx.low = bandwidth, low
        norms = torch.linalg.vector_norm(dec_rows, dim=1)
        l1, l0 = total @ norms / max(1, batch), fired.sum() / max(1, batch)
        fired = fired.long()
        ctx.mark_non_differentiable(fired, *([l0] if threshold is None else []))
        return x_hat, l1, l0, fired

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        d_x_hat: Float[Tensor, "batch d_out"],
        d_l1: Float[Tensor, ""],
        d_l0: Float[Tensor, ""],
        _: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x, enc_rows, dec_rows, threshold, _, total = ctx.saved_tensors
        needs, batch = ctx.needs_input_grad, max(1, len(x))
        norms = torch.linalg.vector_norm(dec_rows, dim=1)
        d_x_hat = d_x_hat.contiguous()
        grads = _Grads(
            torch.empty_like(x) if needs[0] else None,
            torch.zeros_like(enc_rows) if needs[1] else None,
            torch.zeros_like(norms),
            torch.zeros_like(dec_rows) if needs[3] else None,
            None if threshold is None else torch.zeros_like(threshold),
        )
        _add_chunks(ctx, grads, d_x_hat, norms * (d_l1 / batch), d_l0 / batch)
        if grads.dec_rows is not None:  # a row of zeros has the gradient 0 of its norm, as in torch
            per_norm = torch.where(norms > 0, total * (d_l1 / batch) / norms, 0.0)
            grads.dec_rows.addcmul_(dec_rows, per_norm[:, None])
        return *grads[:4], d_x_hat.sum(0) if needs[4] else None, grads.threshold, None, None


def _add_chunks(
    ctx: Any,
    grads: _Grads,
    d_x_hat: Float[Tensor, "batch d_out"],
    d_penalty: Float[Tensor, " d_sae"],
    d_count: Float[Tensor, ""],
) -> None:
    """Go back through the activation, some rows at a time, and add up what the weights get."""
    x, enc_rows, dec_rows, threshold, spare, _ = ctx.saved_tensors
    few, encoder, decoder, outs = (t.to(ctx.low) for t in (x, enc_rows, dec_rows, d_x_hat))
    chunks = _chunks(spare)
    space = _spaces(spare, chunks, 1 if threshold is None else 4)
    for rows in chunks:
        acts, out = spare[rows], outs[rows]
        d_pre, *rest = (part[: len(acts)] for part in space)
        _into(d_pre, out, decoder.T, d_penalty)
        if threshold is None:
            torch.ops.aten.threshold_backward.grad_input(d_pre, acts, 0, grad_input=d_pre)
        else:
            above, near, fires = rest
            torch.gt(torch.sub(acts, threshold, out=above), 0, out=fires)
            torch.lt(above.abs_(), ctx.bandwidth / 2, out=near)
            assert grads.threshold is not None
            lost = near.sum(0) * d_count
            lost.addcmul_(near.mul_(d_pre).sum(0), threshold)
            grads.threshold.sub_(lost, alpha=1 / ctx.bandwidth)
            acts = torch.mul(acts, fires, out=above)
            d_pre.mul_(fires)
        slopes = d_pre.to(ctx.low)
        if grads.dec_rows is not None:
            _add_product(grads.dec_rows, acts.to(ctx.low).T, out)
        if grads.enc_rows is not None:
            _add_product(grads.enc_rows, slopes.T, few[rows])
        if grads.x is not None:
            _into(grads.x[rows], slopes, encoder)
        grads.b_enc.add_(d_pre.sum(0))


def dense_autoencode(  # noqa: PLR0913
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    dec_rows: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
    threshold: Float[Tensor, " d_sae"] | None = None,
    bandwidth: float = 0.001,
    products: torch.dtype | None = None,
    backend: str | None = None,
) -> DenseStep:
    """Encode with ReLU or JumpReLU, decode, and add up the penalties, with one dense matrix held.

    The equations are at the head of the module. Differentiable once: x_hat and l1 in all tensors,
    and, where a threshold is given, l0 in the threshold. A threshold has the pseudo-gradients of
    arXiv 2407.14435 with a rectangle of width `bandwidth`; the other derivatives are true ones.

    Args:
        x: activations (batch, d_in).
        enc_rows: one row per latent (d_sae, d_in).
        b_enc: bias (d_sae,).
        dec_rows: one row per latent (d_sae, d_out).
        b_dec: bias (d_out,).
        b_in: what is subtracted from x (d_in,); it may be b_dec itself.
        threshold: what a pre-activation must exceed (d_sae,); the ReLU without it.
        bandwidth: width of the rectangle around the threshold, above 0.
        products: dtype to which what is multiplied is rounded, `x`'s by default.
        backend: a forced backend; the fastest one by default.

    Returns:
        x_hat, l1, l0 and n_fired, all but the last in the dtype of `x`, whatever autocast says.

    Raises:
        ValueError: if shapes, devices, the bandwidth or the backend do not fit.
        TypeError: if the tensors are not floating point or differ in dtype.
    """
    t = {"enc_rows": enc_rows, "b_enc": b_enc, "dec_rows": dec_rows, "b_dec": b_dec}
    check_floating(x=x, **t, b_in=b_in, threshold=threshold)
    check_shape("enc_rows", enc_rows, None, None)
    d_sae, d_in = enc_rows.shape
    check_shape("x", x, None, d_in)
    check_shape("b_enc", b_enc, d_sae)
    check_shape("dec_rows", dec_rows, d_sae, None)
    check_shape("b_dec", b_dec, dec_rows.shape[1])
    check_shape("b_in", b_in, d_in)
    check_shape("threshold", threshold, d_sae)
    if not bandwidth > 0:
        raise KernelError(f"bandwidth must be above 0, got {bandwidth}")
    with torch.autocast(x.device.type, enabled=False):
        if b_in is not None:
            # Centring by a constant keeps the gradient of b_in out of a (batch, d_in) product: the
            # term added to the bias is zero and carries it as one matrix-vector product.
            b_enc = b_enc - enc_rows.detach() @ (b_in - b_in.detach())
            x = x - b_in.detach()
        given = (x, enc_rows, b_enc, dec_rows, b_dec, threshold, bandwidth)
        if choose(x, backend) == "reference":
            return dense_autoencode_reference(*given)
        return DenseStep(*_DenseStep.apply(*given, products or x.dtype))
