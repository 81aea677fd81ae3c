"""The one autoencoder: encode, decode, initialise."""

from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae import activations
from sae.activations import EncoderWeights, Latents
from sae.architecture import BatchTopK, JumpReLU, ReLU, SAEConfig, TopK
from sae_kernels import sparse_decode

__all__ = ["Latents", "SparseAutoencoder"]


class SparseAutoencoder(nn.Module):
    """A dictionary of d_sae latents over rows of width d_in.

    With u = x * input_scale and b_in either 0 or b_dec:
    a = activation((u - b_in) @ W_enc + b_enc); x_hat = (a @ W_dec + b_dec) / input_scale.
    Inputs and outputs are in the model's units, activations `a` in the dictionary's.
    """

    def __init__(self, config: SAEConfig) -> None:
        """Make the parameters, all fp32 and zero; `initialise` or `sae.load` fills them."""
        super().__init__()
        self.config = config
        d_out = config.width_out
        self.enc_rows = nn.Parameter(torch.zeros(config.d_sae, config.d_in))
        self.dec_rows = nn.Parameter(torch.zeros(config.d_sae, d_out))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        match config.activation:
            case JumpReLU(threshold=threshold):
                self.threshold = nn.Parameter(torch.full((config.d_sae,), float(threshold)))
            case BatchTopK():  # estimated in training, not learned
                self.register_buffer("threshold", torch.tensor(torch.nan))
            case TopK() | ReLU():
                self.threshold = None
            case _:
                assert_never(config.activation)

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """Read-only view of the encoder; column i reads latent i."""
        return self.enc_rows.detach().T

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:
        """Read-only view of the decoder; row i is the direction of latent i."""
        return self.dec_rows.detach()

    def direction(self, latent: int) -> Float[Tensor, " d_out"]:
        """What an activation of 1 of this latent adds, in the model's units."""
        return self.W_dec[latent] / self.config.input_scale

    def encoder(self) -> EncoderWeights:
        """The encoder's weights as the activation functions take them."""
        b_in = self.b_dec if self.config.b_in == "b_dec" else None
        return EncoderWeights(self.enc_rows, self.b_enc, b_in, self.threshold)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Latents:
        """Sparse activations of rows in the model's units."""
        return self.encode_scaled(self.scaled(x))

    def encode_scaled(self, u: Float[Tensor, "batch d_in"]) -> Latents:
        """Sparse activations of rows in the dictionary's units."""
        return activations.encode(self.config.activation, u, self.encoder())

    def encode_dense(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """The same activations as dense rows; only for those who need all of d_sae."""
        return self.encode_dense_scaled(self.scaled(x))

    def encode_dense_scaled(self, u: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Dense activations of rows in the dictionary's units."""
        return activations.encode_dense(self.config.activation, u, self.encoder())

    def decode(self, acts: Latents | Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_out"]:
        """Reconstruction in the model's units, from sparse or dense activations."""
        return self.decode_scaled(acts) / self.config.input_scale

    def decode_scaled(
        self, acts: Latents | Float[Tensor, "batch d_sae"]
    ) -> Float[Tensor, "batch d_out"]:
        """Reconstruction in the dictionary's units: y = a @ W_dec + b_dec."""
        if isinstance(acts, Latents):
            return sparse_decode(acts.values, acts.indices, self.dec_rows, self.b_dec)
        return torch.addmm(self.b_dec, acts, self.dec_rows)

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """Reconstruction of rows, both in the model's units."""
        match self.config.activation:
            case TopK() | BatchTopK():
                return self.decode(self.encode(x))
            case ReLU() | JumpReLU():
                return self.decode(self.encode_dense(x))
            case _:
                assert_never(self.config.activation)

    def scaled(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Rows in the dictionary's units, u = x * input_scale, in fp32 at least.

        Raises:
            ValueError: If the rows are not d_in wide.
        """
        if x.shape[-1] != self.config.d_in:
            raise ValueError(f"rows must be d_in={self.config.d_in} wide, got {tuple(x.shape)}")
        return x.to(self.enc_rows.dtype) * self.config.input_scale


@torch.no_grad()
def initialise(
    dictionary: SparseAutoencoder,
    generator: torch.Generator,
    *,
    mean: Float[Tensor, " d_out"] | None = None,
    decoder_norm: float = 1.0,
) -> None:
    """Random decoder directions of one norm, the encoder their transpose, b_dec the mean.

    Args:
        dictionary: What is filled, in place.
        generator: The only source of randomness.
        mean: Mean of the predicted rows in the model's units; b_dec is 0 without it.
        decoder_norm: Norm of every row of the decoder and of the encoder.
    """
    rows = torch.randn(dictionary.dec_rows.shape, generator=generator)
    rows = rows / rows.norm(dim=1, keepdim=True) * decoder_norm
    dictionary.dec_rows.copy_(rows)
    if dictionary.enc_rows.shape == rows.shape:
        dictionary.enc_rows.copy_(rows)
    else:
        fresh = torch.randn(dictionary.enc_rows.shape, generator=generator)
        dictionary.enc_rows.copy_(fresh / fresh.norm(dim=1, keepdim=True) * decoder_norm)
    dictionary.b_enc.zero_()
    dictionary.b_dec.zero_()
    if mean is not None:
        dictionary.b_dec.copy_(mean * dictionary.config.input_scale)
