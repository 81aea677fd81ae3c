"""Exact changes of a dictionary's weights: each leaves x -> x_hat the same function.

All are computed in fp64 and rounded to fp32 once. n is the norm of a decoder row.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sae.pretrained.canonical import Weights
from sae.pretrained.errors import DictionaryFormatError

LEAST_NORM = 1e-8


def decoder_norm(weights: Weights) -> Weights:
    """Make decoder rows unit; latents grow by n, and with them what they are compared with.

    W_dec /= n, W_enc *= n, b_enc *= n, threshold *= n (gated: b_gate *= n, b_mag *= n). Exact for
    ReLU, JumpReLU and Gated; not for TopK or one shared threshold.
    """
    folded, n = _unit_rows(weights)
    return replace(
        folded,
        threshold=_times(weights.threshold, n),
        b_gate=_times(weights.b_gate, n),
        b_mag=_times(weights.b_mag, n),
    )


def decoder_norm_gate(weights: Weights) -> Weights:
    """The same where the activation is decided on h * n: thresholds stay, and gating is plain.

    Exact for TopK, BatchTopK and JumpReLU that gate by the decoder's norm, with any threshold.
    """
    return _unit_rows(weights)[0]


def scales_keeping_latents(weights: Weights, s_in: float, s_out: float) -> Weights:
    """Fold u = s_in * x and x_hat = y / s_out; latents keep the units they were trained in.

    W_enc *= s_in, b_in /= s_in, W_dec /= s_out, b_dec /= s_out, W_skip *= s_in / s_out.
    """
    return replace(
        weights,
        enc_rows=_times(weights.enc_rows, s_in),
        b_in=_times(weights.b_in, 1 / s_in),
        dec_rows=_times(weights.dec_rows, 1 / s_out),
        b_dec=_times(weights.b_dec, 1 / s_out),
        skip_rows=_times(weights.skip_rows, s_in / s_out),
    )


def scales_scaling_latents(weights: Weights, s_in: float, s_out: float) -> Weights:
    """Fold u = s_in * x and x_hat = y / s_out; latents come in the units of the raw rows.

    W_enc stays, b_enc /= s_in, threshold /= s_in, b_in /= s_in, W_dec *= s_in / s_out,
    b_dec /= s_out, W_skip *= s_in / s_out.
    """
    return replace(
        weights,
        b_enc=_times(weights.b_enc, 1 / s_in),
        threshold=_times(weights.threshold, 1 / s_in),
        b_in=_times(weights.b_in, 1 / s_in),
        dec_rows=_times(weights.dec_rows, s_in / s_out),
        b_dec=_times(weights.b_dec, 1 / s_out),
        skip_rows=_times(weights.skip_rows, s_in / s_out),
    )


def threshold_of_relu(weights: Weights, done: list[str]) -> Weights:
    """Turn relu(h) * [h > threshold] into h * [h > threshold]: thresholds below 0 become 0."""
    assert weights.threshold is not None
    if float(weights.threshold.min()) < 0:
        done.append("thresholds below 0 raised to 0")
    return replace(weights, threshold=weights.threshold.clamp_min(0))


def exp(logarithms: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Thresholds of their logarithms."""
    return logarithms.double().exp().to(torch.float32)


def one_threshold_for_all(weights: Weights, threshold: float) -> Weights:
    """Give every latent the same threshold."""
    return replace(weights, threshold=weights.b_dec.new_full((weights.d_sae,), threshold))


def _unit_rows(weights: Weights) -> tuple[Weights, Tensor]:
    n = weights.dec_rows.double().norm(dim=1)
    if float(n.min()) < LEAST_NORM:
        raise DictionaryFormatError(
            f"decoder rows must have a norm of at least {LEAST_NORM} to be made unit, got "
            f"{float(n.min()):.3g} for latent {int(n.argmin())}"
        )
    folded = replace(
        weights,
        enc_rows=_times(weights.enc_rows, n[:, None]),
        dec_rows=_times(weights.dec_rows, 1 / n[:, None]),
        b_enc=_times(weights.b_enc, n),
    )
    return folded, n


def _times(
    tensor: Float[Tensor, "..."] | None, factor: Float[Tensor, "..."] | float
) -> Float[Tensor, "..."] | None:
    return None if tensor is None else (tensor.double() * factor).to(torch.float32)
