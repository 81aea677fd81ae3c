"""Triton kernel of `latent_adam_`: a row is read once, stepped and written once."""

# ruff: noqa: PLR0913
# pyright: reportCallIssue=false
# Kernels take what they need one by one, and a launch takes num_warps besides.

import math
from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sae_kernels import blocks
from sae_kernels.blocks import launch
from sae_kernels.launch import KernelError

NORMS = {"none": 0, "unit": 1, "max": 2}


@triton.jit
@no_type_check
def _renormed(rows, NORM: tl.constexpr):
    """Bring a row to norm 1 (NORM 1; zeros stay), or down to it where it is longer (NORM 2)."""
    if NORM > 0:
        norm = tl.sqrt(tl.sum(rows * rows, axis=0))
        rows = rows / tl.maximum(norm, 1.0 if NORM == 2 else 1.1754944e-38)
    return rows


@triton.jit
@no_type_check
def _one_less_exp(x):
    """Compute 1 - exp(x) for x <= 0, near 0 by the series, where the difference loses digits."""
    x = tl.maximum(x, -100.0)
    series = 1 + x / 7 * (1 + x / 8 * (1 + x / 9))
    series = 1 + x / 4 * (1 + x / 5 * (1 + x / 6 * series))
    series = -x * (1 + x / 2 * (1 + x / 3 * series))
    return tl.where(x > -0.5, series, 1 - tl.exp(x))


@triton.jit
@no_type_check
def _latent_adam_kernel(
    rows, grad, exp_avg, exp_avg_sq, shadow, clip, skip, step, width,
    lr, beta1, new1, log1, beta2, new2, log2, eps, decay,
    PROJECT: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr, SHADOW: tl.constexpr,
    SKIP: tl.constexpr, WIDTH: tl.constexpr, RATE: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Step one row a program.

    `new1`, `new2` are 1 - beta1 and 1 - beta2, and `log1`, `log2` the logarithms of the betas;
    `decay` is that of the weights. With RATE the learning rate is read on the device. A step that
    is skipped reads and writes nothing.
    """
    column = tl.arange(0, WIDTH)
    inside = column < (tl.where(tl.load(skip) > 0, 0, width) if SKIP else width)
    place = tl.program_id(0).to(tl.int64) * width + column
    row = tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(exp_avg + place, mask=inside, other=0.0).to(tl.float32)
    square = tl.load(exp_avg_sq + place, mask=inside, other=0.0).to(tl.float32)
    if CLIP:
        slope *= tl.load(clip).to(tl.float32)
    if PROJECT:
        length = tl.maximum(tl.sum(row * row, axis=0), 1.1754944e-38)
        slope -= row * (tl.sum(slope * row, axis=0) / length)
    mean = beta1 * mean + new1 * slope
    square = beta2 * square + new2 * slope * slope
    number = tl.maximum(tl.load(step).to(tl.float32), 1.0)  # 0 before the first that is taken
    if RATE:
        lr = tl.load(lr).to(tl.float32)
    rate = lr / _one_less_exp(number * log1)
    unbias2 = 1.0 / _one_less_exp(number * log2)
    if DECAY:
        row -= row * (lr * decay)
    row -= rate * (mean / (tl.sqrt(square * unbias2) + eps))  # so fewer registers spill
    row = _renormed(row, NORM)
    tl.store(rows + place, row, mask=inside)
    tl.store(exp_avg + place, mean, mask=inside)
    tl.store(exp_avg_sq + place, square, mask=inside)
    if SHADOW:
        tl.store(shadow + place, row, mask=inside)


def _log(beta: float) -> float:
    """Take the logarithm of a decay; of 0 one that no power brings back."""
    return math.log(beta) if beta > 0 else -1e4


def latent_adam_(
    rows: Float[Tensor, "d_sae d_out"],
    grad: Float[Tensor, "d_sae d_out"],
    exp_avg: Float[Tensor, "d_sae d_out"],
    exp_avg_sq: Float[Tensor, "d_sae d_out"],
    *,
    lr: float | Float[Tensor, ""],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: Float[Tensor, ""],
    skip: Float[Tensor, ""] | None,
    project: bool,
    norm: str,
    clip: Float[Tensor, ""] | None,
    shadow: Float[Tensor, "d_sae d_out"] | None,
) -> None:
    """Clip, project, step by Adam, bring to the norm and copy to 16 bits, row by row, in place.

    Args:
        rows: weights, contiguous like the rest.
        grad: their gradient.
        exp_avg: Adam's first moment.
        exp_avg_sq: Adam's second moment.
        lr: learning rate, which may lie on the device.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW.
        step: number of the step, on the device.
        skip: where it is not 0, on the device, everything stays as it is.
        project: take the part of the gradient along the row out.
        norm: "none", "unit" (every row has norm 1) or "max" (at most 1).
        clip: what the gradient is multiplied by, on the device.
        shadow: gets the new rows in its own dtype.

    Raises:
        ValueError: if a row is wider than one program can hold.
    """
    d_sae, width = rows.shape
    if width > blocks.MAX_ROW:
        raise KernelError(
            f"rows must have at most {blocks.MAX_ROW} columns with backend 'triton', got {width}; "
            "use backend='torch'"
        )
    if not rows.numel():
        return
    block = blocks.whole_row(width)
    launch(
        _latent_adam_kernel, (d_sae,), rows,
        rows, grad, exp_avg, exp_avg_sq, rows if shadow is None else shadow,
        rows if clip is None else clip, step if skip is None else skip, step, width,
        lr, beta1, 1 - beta1, _log(beta1), beta2, 1 - beta2, _log(beta2), eps,
        weight_decay,
        PROJECT=project, NORM=NORMS[norm], CLIP=clip is not None, SHADOW=shadow is not None,
        SKIP=skip is not None, WIDTH=block.width, RATE=isinstance(lr, Tensor),
        DECAY=weight_decay > 0, num_warps=block.warps,
    )  # fmt: skip
