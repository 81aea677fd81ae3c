"""One forward pass of training per kind of activation: losses, and what fired."""

from typing import NamedTuple, assert_never

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae import activations, losses
from sae.activations import Latents
from sae.architecture import BatchTopK, JumpReLU, ReLU, TopK
from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.schedule import ramp
from sae_kernels import auxk, dense_autoencode


class Forward(NamedTuple):
    """What a forward pass gives."""

    loss: Float[Tensor, ""]
    """What is minimised."""
    error: Float[Tensor, ""]
    """Its part that is the squared error, summed over d."""
    fired: Int[Tensor, " latent"]
    """Numbers of the latents that fired in any row."""
    l0: Float[Tensor, ""]
    """Mean number of latents that fired in a row."""
    threshold: Float[Tensor, ""] | None = None
    """For BatchTopK: the smallest activation that was kept."""


class Moment(NamedTuple):
    """Where training stands, as far as the losses depend on it."""

    n_steps: int
    total_steps: int
    dead: Bool[Tensor, " d_sae"]
    """Latents that are dead."""
    bf16: bool
    """Whether the encoder's and the dense products are in bfloat16."""


def forward(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    u: Float[Tensor, "batch d_in"],
    moment: Moment,
) -> Forward:
    """Losses of rows in the dictionary's units."""
    with autocast(u.device, moment.bf16):
        match autoencoder.config.activation:
            case TopK():
                return _sparse(autoencoder, config, u, moment, autoencoder.encode_scaled(u))
            case BatchTopK() as activation:
                latents = activations.encode_batch(activation, u, autoencoder.encoder())
                found = _sparse(autoencoder, config, u, moment, latents)
                return found._replace(threshold=_smallest(latents))
            case ReLU() if moment.bf16:
                return _relu_in_bf16(autoencoder, config, u, moment)
            case ReLU() | JumpReLU():
                return _dense(autoencoder, config, u, moment)
            case _:
                assert_never(autoencoder.config.activation)


def autocast(device: torch.device, is_on: bool) -> torch.autocast:
    """A context in which products are in bfloat16, if it is on."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_on)


def _sparse(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    u: Float[Tensor, "batch d_in"],
    moment: Moment,
    latents: Latents,
) -> Forward:
    with autocast(u.device, False):
        y = autoencoder.decode_scaled(latents)
    error = losses.squared_error(u, y)
    loss = error
    if config.auxk is not None and bool(moment.dead.any()):
        guess = _auxk(autoencoder, config, u, moment.dead)
        loss = loss + config.auxk.coefficient * losses.squared_error((u - y).detach(), guess)
    fires = latents.values > 0
    fired = latents.indices[fires].unique()
    return Forward(loss, error, fired, fires.sum(dim=1).float().mean())


def _auxk(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    u: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " d_sae"],
) -> Float[Tensor, "batch d_out"]:
    settings, weights = config.auxk, autoencoder.encoder()
    assert settings is not None
    k = settings.k or max(u.shape[1] // 2, 1)
    b_in = None if weights.b_in is None else weights.b_in.detach()
    rows = (weights.enc_rows, weights.b_enc, autoencoder.dec_rows)
    return auxk(u, *rows, dead, k, b_in=b_in).float()


def _smallest(latents: Latents) -> Float[Tensor, ""]:
    values = latents.values.detach()
    return values.masked_fill(values <= 0, torch.inf).min()


def _dense(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    u: Float[Tensor, "batch d_in"],
    moment: Moment,
) -> Forward:
    """The step of the families with dense latents, differentiated by hand, in float32."""
    weights, activation = autoencoder.encoder(), autoencoder.config.activation
    bandwidth = activation.bandwidth if isinstance(activation, JumpReLU) else 1.0
    with autocast(u.device, False):
        step = dense_autoencode(
            u,
            weights.enc_rows,
            weights.b_enc,
            autoencoder.dec_rows,
            autoencoder.b_dec,
            b_in=weights.b_in,
            threshold=weights.threshold,
            bandwidth=bandwidth,
        )
    error = losses.squared_error(u, step.x_hat)
    loss = error + _penalty(config, moment, step.l1, step.l0)
    return Forward(loss, error, step.n_fired.nonzero().squeeze(1), step.l0.detach())


def _relu_in_bf16(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    u: Float[Tensor, "batch d_in"],
    moment: Moment,
) -> Forward:
    """The same for ReLU with products in bfloat16, differentiated by autograd."""
    acts = autoencoder.encode_dense_scaled(u)
    error = losses.squared_error(u, autoencoder.decode_scaled(acts).float())
    l1 = losses.l1_decoder_norm(acts, autoencoder.dec_rows.norm(dim=1))
    fires = acts.detach() > 0
    l0 = fires.sum(dim=1).float().mean()
    loss = error + _penalty(config, moment, l1, l0)
    return Forward(loss, error, fires.any(dim=0).nonzero().squeeze(1), l0)


def _penalty(
    config: DictionaryConfig, moment: Moment, l1: Float[Tensor, ""], l0: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """The sparsity penalty that is asked for, at its weight of this moment."""
    if config.l1 is not None:
        weight = ramp(moment.n_steps, moment.total_steps, config.l1.ramp)
        return config.l1.coefficient * weight * l1
    assert config.l0 is not None
    weight = ramp(moment.n_steps, moment.total_steps, config.l0.ramp)
    return config.l0.coefficient * weight * losses.l0_penalty(l0, config.l0.target)
