"""A dictionary in the plainer forms that other libraries can express; each step is exact.

Steps return new config and weights, and add a line to `done` where numbers changed.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sae.architecture import BatchTopK, GroupMax, JumpReLU, ReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder
from sae.pretrained import folds
from sae.pretrained.canonical import Weights
from sae.pretrained.errors import DictionaryFormatError

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
    folded = folds.scales_keeping_latents(weights, s_in, s_out)
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
                folds.decoder_norm_gate(weights),
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
    weights = folds.one_threshold_for_all(given.weights, float(threshold))
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

    Raises:
        DictionaryFormatError: For a plain TopK with other rows, which this would change.
    """
    n = given.weights.dec_rows.double().norm(dim=1)
    off = float((n - 1).abs().max())
    if off <= UNIT:
        return given
    if isinstance(given.config.activation, TopK | GroupMax):
        raise DictionaryFormatError(
            f"decoder rows must be unit for a top-k, got norms off by {off:.3g}: making them unit "
            "would change which latents are the k largest"
        )
    return given.after(
        "decoder norms moved into the encoder: latents are larger by them",
        folds.decoder_norm(given.weights),
    )


def _seen(weights: Weights, bias: Tensor | None) -> Tensor:
    """What the encoder makes of a bias of the input."""
    if bias is None:
        return torch.zeros(weights.d_sae, dtype=torch.float64)
    return weights.enc_rows.double() @ bias.double()


def _plus(bias: Tensor, shift: Tensor) -> Tensor:
    return (bias.double() + shift).float()
