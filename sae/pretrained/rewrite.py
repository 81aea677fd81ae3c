"""A dictionary in the plainer forms that other libraries can express; each step is exact.

Steps return new config and weights, and add a line to `done` where numbers changed.

Exact changes of a dictionary's weights: each leaves x -> x_hat the same function.

All are computed in fp64 and rounded to fp32 once. n is the norm of a decoder row.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architecture import BatchTopK, GroupMax, JumpReLU, ReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder
from sae.pretrained.canonical import Weights
from sae.pretrained.foreign import DictionaryFormatError

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


def for_rows_with_mean(weights: Weights, *, centred: bool) -> Weights:
    """Take off each row its mean over dimensions, in the encoder: W_enc' = (I - 1 1^T / d) W_enc.

    For a dictionary that was trained on a stream without that mean, as TransformerLens has it with
    center_writing_weights. The latents are then those of the whole stream; the reconstruction goes
    on lacking its mean.

    Args:
        weights: Of ReLU, TopK or JumpReLU.
        centred: Whether b_dec is subtracted first: all of that goes through the encoder.
    """
    mean = weights.enc_rows.double().mean(dim=1)
    b_enc = weights.b_enc
    if centred and b_enc is not None:
        b_enc = (b_enc.double() - weights.b_dec.double().sum() * mean).float()
    rows = (weights.enc_rows.double() - mean[:, None]).float()
    return replace(weights, enc_rows=rows, b_enc=b_enc)


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


UNIT = 1e-6
"""How far a norm may be from 1 and count as 1; fp32 rows that were normalised are this near."""


class Plain(NamedTuple):
    """A dictionary on its way to another format."""

    config: SAEConfig
    """Its form."""
    weights: Weights
    """Its tensors, fp32."""
    done: tuple[str, ...] = ()
    """What was folded."""

    def after(self, what: str, weights: Weights, **changes: object) -> "Plain":
        """The dictionary after one more fold."""
        return Plain(replace(self.config, **changes), weights, (*self.done, what))  # pyright: ignore[reportArgumentType]


def plain(dictionary: SparseAutoencoder) -> Plain:
    """Take a dictionary and fold its scales and its gate by decoder norms.

    Raises:
        DictionaryFormatError: If a gated row has no direction, or for several hook points.
    """
    state = {
        name: tensor.detach().cpu().float() for name, tensor in dictionary.state_dict().items()
    }
    given = Plain(of_one_hook_point(dictionary.config), Weights(**state))
    return without_gate(without_scales(given))


def of_one_hook_point(config: SAEConfig) -> SAEConfig:
    """The config without the names of its hook points, their scales in those of the whole.

    Raises:
        DictionaryFormatError: If rows of several hook points lie side by side.
    """
    several = [p.hook_point for p in (*config.slices_in[1:], *config.slices_out[1:])]
    if several:
        raise DictionaryFormatError(
            "a dictionary must read and predict one hook point each to be written for another "
            f"library, got others beside it: {several}"
        )
    s_in = config.input_scale * config.slices_in[0].scale
    s_out = config.scale_out * config.slices_out[0].scale
    return replace(
        config,
        inputs=(),
        outputs=(),
        input_scale=s_in,
        output_scale=None if s_in == s_out else s_out,
    )


def without_scales(given: Plain) -> Plain:
    """Fold input_scale and output_scale; latents keep their units."""
    config, weights = given.config, given.weights
    s_in, s_out = config.input_scale, config.scale_out
    if s_in == s_out == 1:
        return given
    if config.b_in == "b_dec" and s_in != s_out:
        weights = replace(weights, b_in=weights.b_dec)
        config = replace(config, b_in="own")
    folded = scales_keeping_latents(weights, s_in, s_out)
    what = f"scales folded: input {s_in:.6g}, output {s_out:.6g}"
    return Plain(config, folded, given.done).after(what, folded, input_scale=1.0, output_scale=None)


def without_gate(given: Plain) -> Plain:
    """Make the activation see h instead of h times the decoder's norms."""
    config, weights = given.config, given.weights
    if not config.gate_by_decoder_norm:
        return given
    match config.activation:
        case ReLU():
            return given.after("gate by decoder norms dropped: it changes no sign", weights,
                               gate_by_decoder_norm=False)  # fmt: skip
        case JumpReLU():
            assert weights.threshold is not None
            n = weights.dec_rows.double().norm(dim=1)
            folded = replace(weights, threshold=(weights.threshold.double() / n).float())
            if not bool(folded.threshold.isfinite().all()):  # pyright: ignore[reportOptionalMemberAccess]
                raise DictionaryFormatError("decoder rows must have a direction, got a row of 0")
            return given.after("thresholds divided by decoder norms", folded,
                               gate_by_decoder_norm=False)  # fmt: skip
        case _:
            return given.after(
                "decoder norms moved into the encoder: latents are larger by them",
                decoder_norm_gate(weights),
                gate_by_decoder_norm=False,
            )


def with_thresholds(given: Plain) -> Plain:
    """Turn a BatchTopK, as it is after training, into the JumpReLU that it is.

    Raises:
        DictionaryFormatError: If its threshold was never estimated.
    """
    if not isinstance(given.config.activation, BatchTopK):
        return given
    threshold = given.weights.threshold
    assert threshold is not None
    if not bool(threshold > 0):
        raise DictionaryFormatError(f"threshold must be above 0, got {float(threshold):g}")
    weights = one_threshold_for_all(given.weights, float(threshold))
    what = "the threshold of the batch's top-k given to every latent"
    return given.after(what, weights, activation=JumpReLU())


def centred_by(given: Plain, b_in: Literal["none", "b_dec"]) -> Plain:
    """Change what is subtracted before the encoder and let its bias make up for it."""
    config, weights = given.config, given.weights
    if config.b_in == b_in:
        return given
    before = {"none": None, "b_dec": weights.b_dec, "own": weights.b_in}[config.b_in]
    shift = _seen(weights, weights.b_dec if b_in == "b_dec" else None) - _seen(weights, before)
    if weights.b_enc is not None:
        folded = replace(weights, b_enc=_plus(weights.b_enc, shift))
    else:
        assert weights.b_gate is not None
        assert weights.b_mag is not None
        assert weights.r_mag is not None
        folded = replace(
            weights,
            b_gate=_plus(weights.b_gate, shift),
            b_mag=_plus(weights.b_mag, shift * weights.r_mag.double().exp()),
        )
    what = f"centring by {config.b_in} changed to {b_in}, the encoder's bias with it"
    return given.after(what, replace(folded, b_in=None), b_in=b_in)


def with_unit_rows(given: Plain) -> Plain:
    """Make decoder rows unit, which SAEBench requires.

    One factor for all latents, such as the scale of the input, changes no order among them.

    Raises:
        DictionaryFormatError: For a top-k whose rows differ in norm, which this would change.
    """
    n = given.weights.dec_rows.double().norm(dim=1)
    if float((n - 1).abs().max()) <= UNIT:
        return given
    apart = float((n / n.median() - 1).abs().max())
    if isinstance(given.config.activation, TopK | GroupMax) and apart > UNIT:
        raise DictionaryFormatError(
            f"decoder rows must have one norm for a top-k, got norms that differ by {apart:.3g}: "
            "making them unit would change which latents are the k largest"
        )
    return given.after(
        "decoder norms moved into the encoder: latents are larger by them",
        decoder_norm(given.weights),
    )


def _seen(weights: Weights, bias: Tensor | None) -> Tensor:
    """What the encoder makes of a bias of the input."""
    if bias is None:
        return torch.zeros(weights.d_sae, dtype=torch.float64)
    return weights.enc_rows.double() @ bias.double()


def _plus(bias: Tensor, shift: Tensor) -> Tensor:
    return (bias.double() + shift).float()
