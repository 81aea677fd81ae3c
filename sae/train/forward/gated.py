"""The forward pass of gated dictionaries (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae import activations, losses
from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.forward.result import Forward, Moment
from sae.train.schedule import ramp


def forward(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    u: Float[Tensor, "batch d_in"],
    moment: Moment,
) -> Forward:
    """The error, the penalty on the gates, and the error of what the gates alone reconstruct.

    A gate that opens or shuts has no gradient of its own: the gates learn from the last two, of
    which the last holds the decoder still.
    """
    assert config.l1 is not None
    b_gate, b_mag, r_mag = (autoencoder.get_parameter(n) for n in ("b_gate", "b_mag", "r_mag"))
    weights = autoencoder.encoder()._replace(b_enc=torch.zeros_like(b_gate))
    pi = activations.pre_acts(u, weights).to(u.dtype)
    gates = torch.relu(pi + b_gate)
    acts = torch.relu(pi * r_mag.exp() + b_mag) * (gates > 0)
    error = losses.squared_error(u, autoencoder.decode_scaled(acts).to(u.dtype))
    dec_rows, b_dec = autoencoder.dec_rows, autoencoder.b_dec.detach()
    guess = torch.addmm(b_dec, gates, dec_rows.detach()).to(u.dtype)
    penalty = losses.l1_decoder_norm(gates, dec_rows.norm(dim=1))
    weight = config.l1.coefficient * ramp(moment.n_steps, moment.total_steps, config.l1.ramp)
    loss = error + weight * penalty + losses.squared_error(u, guess)
    fires = acts.detach() > 0
    fired = fires.any(dim=0).nonzero().squeeze(1)
    return Forward(loss, error, fired, fires.sum(dim=1).float().mean())
