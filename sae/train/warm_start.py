"""Training that starts from the weights of a dictionary."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae import pretrained
from sae.architecture import SAEConfig, Slice
from sae.autoencoder import SparseAutoencoder

UNIT = 1e-3
"""By how much the norm of a decoder row may differ from 1 to be kept there."""


def start_from(path: str, form: SAEConfig, *, unit_norm: bool) -> SparseAutoencoder:
    """Load a dictionary and bring it exactly to the units of `form`.

    With r = new scale / old scale, activations, biases and thresholds become r times as large, the
    rows of encoder and decoder stay, and x -> x_hat is the same function. Where r differs between
    the columns, the latents' r is the mean of the output's, and the rows take up the difference.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If it is no dictionary, or one of another form.
    """
    old = pretrained.load(path)
    _require_same(path, old.config, form)
    r_in = _columns(form.slices_in, form.input_scale)
    r_in /= _columns(old.config.slices_in, old.config.input_scale)
    r_out = _columns(form.slices_out, form.scale_out)
    r_out /= _columns(old.config.slices_out, old.config.scale_out)
    made = SparseAutoencoder(form)
    made.load_state_dict({n: _scaled(n, t, r_in, r_out) for n, t in old.state_dict().items()})
    norms = made.W_dec.norm(dim=1)
    if unit_norm and float((norms - 1).abs().max()) > UNIT:
        raise ValueError(
            "init_from must be a dictionary whose decoder rows have norm 1 beside unit_norm, got "
            f"norms from {float(norms.min()):.3g} to {float(norms.max()):.3g} in {path}; set "
            "unit_norm: false"
        )
    return made


def _columns(slices: tuple[Slice, ...], scale: float) -> Float[Tensor, " d_in"]:
    """The scale of each column."""
    parts = [torch.full((part.width,), scale * part.scale, dtype=torch.float64) for part in slices]
    return torch.cat(parts)


def _scaled(
    name: str, tensor: Tensor, r_in: Float[Tensor, " d_in"], r_out: Float[Tensor, " d_out"]
) -> Tensor:
    """A weight in the new units."""
    whole, r_latents = tensor.double(), r_out.mean()
    match name:
        case "b_in":
            whole = whole * r_in
        case "b_dec":
            whole = whole * r_out
        case "b_enc" | "threshold" | "b_gate" | "b_mag":
            whole = whole * r_latents
        case "enc_rows":
            whole = whole * (r_latents / r_in)
        case "dec_rows":
            whole = whole * (r_out / r_latents)
        case "skip_rows":
            whole = whole * (r_out[:, None] / r_in)
    return whole.to(torch.float32)


def _require_same(path: str, old: SAEConfig, form: SAEConfig) -> None:
    """Refuse a dictionary of another form; k and where thresholds begin may differ."""
    values = {
        "activation.kind": (old.activation.kind, form.activation.kind),
        "d_in": (old.d_in, form.d_in),
        "d_out": (old.width_out, form.width_out),
        **{
            name: (getattr(old, name), getattr(form, name))
            for name in ("d_sae", "b_in", "input_norm", "gate_by_decoder_norm", "skip")
        },
    }
    for name, (found, wanted) in values.items():
        if found != wanted:
            raise ValueError(
                f"init_from must be a dictionary with {name}={wanted!r}, got {found!r} in {path}; "
                "choose another one or change the entry"
            )
