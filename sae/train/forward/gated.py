"""The forward pass of gated dictionaries (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

import torch

from sae import activations, losses
from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.forward.result import Forward, Moment, Rows
from sae.train.schedule import ramp


def forward(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
) -> Forward:
    """The error, the penalty on the gates, and the error of what the gates alone reconstruct.

    A gate that opens or shuts has no gradient of its own: the gates learn from the last two, of
    which the last holds the decoder still.
    """
    assert config.l1 is not None
    u, v = rows
    b_gate, b_mag, r_mag = (autoencoder.get_parameter(n) for n in ("b_gate", "b_mag", "r_mag"))
    weights = autoencoder.encoder()._replace(b_enc=torch.zeros_like(b_gate))
    pi = activations.pre_acts(u, weights).to(u.dtype)
    gates = torch.relu(pi + b_gate)
    acts = torch.relu(pi * r_mag.exp() + b_mag) * (gates > 0)
    y = autoencoder.decode_scaled(acts, u).to(u.dtype)
    error = losses.squared_error(v, y)
    dec_rows, b_dec = autoencoder.dec_rows.detach(), autoencoder.b_dec.detach()
    past = torch.as_tensor(autoencoder.skipped(u)).detach()
    guess = (torch.addmm(b_dec, gates, dec_rows) + past).to(u.dtype)
    penalty = losses.l1_decoder_norm(gates, autoencoder.decoder_norms())
    weight = config.l1.coefficient * ramp(moment.n_steps, moment.total_steps, config.l1.ramp)
    loss = error + weight * moment.power.scale * penalty + losses.squared_error(v, guess)
    fires = acts.detach() > 0
    l0 = fires.sum(dim=1).float().mean()
    return Forward(loss, error, fires.sum(dim=0), l0, y.detach())
