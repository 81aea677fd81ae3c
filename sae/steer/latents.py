"""Activations of a few latents of a stream, by their own rows where that is enough."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import activations
from sae.activations import EncoderWeights
from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU
from sae.autoencoder import SparseAutoencoder

Reader = Callable[[Float[Tensor, "batch d_in"]], Float[Tensor, "batch k"]]
"""From rows of the stream, in the model's units, to the activations of the latents asked for."""


def latent_reader(dictionary: SparseAutoencoder, latents: Int[Tensor, " k"]) -> Reader:
    """Return what reads the activations of a few latents, 0 where one does not fire.

    Where each latent is decided by itself (ReLU, JumpReLU, gated, and BatchTopK with its
    threshold) only their rows of the encoder are read: k d_in products per row of the stream in
    the place of d_sae d_in. Under TopK the others decide too, so all are encoded.

    Args:
        dictionary: The weights are taken as they are now.
        latents: Numbers; a latent may come more than once.
    """
    activation = dictionary.config.activation
    if isinstance(activation, ReLU | JumpReLU | Gated | BatchTopK):
        weights = _of_latents(dictionary.encoder(), latents)
        return lambda x: activations.encode_dense(activation, dictionary.scaled(x), weights)

    def picked(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch k"]:
        encoded = dictionary.encode(x)
        found = encoded.indices[:, :, None] == latents
        return (encoded.values[:, :, None] * found).sum(dim=1)

    return picked


def _of_latents(weights: EncoderWeights, latents: Int[Tensor, " k"]) -> EncoderWeights:
    """The encoder of some latents; constants, so gradients flow to the stream alone."""

    def part(tensor: Tensor) -> Tensor:
        return tensor.detach() if tensor.dim() == 0 else tensor.detach()[latents]

    magnitude, b_in = weights.magnitude, weights.b_in
    return EncoderWeights(
        enc_rows=part(weights.enc_rows),
        b_enc=part(weights.b_enc),
        b_in=None if b_in is None else b_in.detach(),
        threshold=None if weights.threshold is None else part(weights.threshold),
        magnitude=None if magnitude is None else type(magnitude)(*map(part, magnitude)),
        norms=None if weights.norms is None else part(weights.norms),
    )


def directions_of(
    dictionary: SparseAutoencoder, latents: Int[Tensor, " k"]
) -> Float[Tensor, "k d_out"]:
    """What an activation of 1 of each latent adds to the stream, in the model's units.

    With a norm of the input it is in units of what that norm divided the row by.
    """
    return dictionary.directions[latents]


@torch.no_grad()
def read_latents(
    dictionary: SparseAutoencoder, x: Float[Tensor, "batch d_in"], latents: Int[Tensor, " k"]
) -> Float[Tensor, "batch k"]:
    """Activations of a few latents, 0 where one does not fire."""
    return latent_reader(dictionary, latents)(x)
