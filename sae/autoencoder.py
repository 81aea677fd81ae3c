"""The one autoencoder: encode, decode, initialise."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from monosema.checks import MonosemaError
from sae import activations, notebook
from sae.activations import EncoderWeights, Latents, Magnitude
from sae.architecture import Gated, SAEConfig, Slice
from sae.read_out import Decoder, Readable, ReadOutName, checked, encode_refined
from sae_kernels import sparse_decode

__all__ = ["Latents", "SparseAutoencoder"]

NORM_EPS = 1e-5
"""Keeps a row without spread from a division by 0."""


class TokenNorm(NamedTuple):
    """What the norm of the input took from each row, and the output gets back."""

    mean: Float[Tensor, "batch _"] | float
    size: Float[Tensor, "batch _"] | float


class SparseAutoencoder(Readable):
    """A dictionary of d_sae latents over rows of width d_in.

    With u = input_norm(x) * input_scale:
    a = activation((u - b_in) @ W_enc + b_enc);  y = a @ W_dec + b_dec (+ u @ W_skip);
    x_hat = y / output_scale with the input's norm undone. Inputs and outputs are in the model's
    units, activations `a` in the dictionary's. A gated dictionary has b_gate, b_mag and r_mag
    instead of b_enc, which is None.
    """

    b_enc: nn.Parameter
    threshold: Tensor | None

    def __init__(self, config: SAEConfig) -> None:
        """Make the parameters, all fp32 and zero; `initialise` or `sae.load` fills them.

        Raises:
            TypeError: If the config is of another class.
        """
        super().__init__()
        if not isinstance(config, SAEConfig):
            raise TypeError(f"config must be an SAEConfig, got {type(config).__name__}")
        self.config = config
        self.provenance: Mapping[str, Any] = {}
        d_in, d_sae, d_out = config.d_in, config.d_sae, config.width_out
        self.enc_rows = nn.Parameter(torch.zeros(d_sae, d_in))
        self.dec_rows = nn.Parameter(torch.zeros(d_sae, d_out))
        if isinstance(config.activation, Gated):
            self.register_parameter("b_enc", None)
            for name in ("b_gate", "b_mag", "r_mag"):
                self.register_parameter(name, nn.Parameter(torch.zeros(d_sae)))
        else:
            self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        if config.b_in == "own":
            self.b_in = nn.Parameter(torch.zeros(d_in))
        if config.skip:
            self.skip_rows = nn.Parameter(torch.zeros(d_out, d_in))
        match config.activation.facts.threshold:
            case "per latent":
                start = float(config.activation.first_threshold)
                self.threshold = nn.Parameter(torch.full((d_sae,), start))
            case "one":  # estimated in training, not learned
                self.register_buffer("threshold", torch.tensor(torch.nan))
            case "none":
                self.threshold = None

    def extra_repr(self) -> str:
        """Say what it is, for `repr`."""
        config, place = self.config, " and ".join(self.config.hook_points)
        written = " and ".join(part.hook_point for part in config.outputs)
        where = f", of {place}" + (f" to {written}" if written else "") if place else ""
        out = "" if config.width_out == config.d_in else f", d_out={config.width_out}"
        return f"{config.activation!r}, d_in={config.d_in}, d_sae={config.d_sae}{out}{where}"

    def _repr_html_(self) -> str:
        return notebook.dictionary(self)

    @property
    def hook_point(self) -> str:
        """The one place in a model that it reads; `config.hook_points` has those of several."""
        return self.config.hook_point

    def at(self, hook_point: str, hook_point_out: str | None = None) -> "SparseAutoencoder":
        """Say where in a model it belongs, and return it; what it knows already is only compared.

        Args:
            hook_point: What it reads, such as "model.layers.7:out".
            hook_point_out: What a transcoder predicts.

        Raises:
            ValueError: If it belongs elsewhere.
        """
        self.config = self.config.at(hook_point, hook_point_out)
        return self

    def require_latent(self, latent: int) -> None:
        """Check the number of a latent.

        Raises:
            ValueError: If there is no such latent.
        """
        if not 0 <= latent < self.config.d_sae:
            raise MonosemaError(f"latent must be below d_sae={self.config.d_sae}, got {latent}")

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """Read-only view of the encoder; column i reads latent i."""
        return self.enc_rows.detach().T

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:
        """Read-only view of the decoder; row i is the direction of latent i."""
        return self.dec_rows.detach()

    def direction(self, latent: int) -> Float[Tensor, " d_out"]:
        """What an activation of 1 of this latent adds, in the model's units.

        With a norm of the input it is in units of what that norm divided the row by.
        """
        return self.directions[latent]

    @property
    def directions(self) -> Float[Tensor, "d_sae d_out"]:
        """The directions of all latents, as `direction` gives each."""
        return self.W_dec / _scales(self.config.slices_out, self.config.scale_out, self.W_dec)

    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """||W_dec[i]||, or the sum over the output's hook points of the norms of its parts.

        What penalties weigh activations by, and gates compare (Lindsey et al. 2024 for the sum).
        """
        parts = self.dec_rows.split([part.width for part in self.config.slices_out], dim=1)
        norms = [part.norm(dim=1) for part in parts]
        return norms[0] if len(norms) == 1 else torch.stack(norms).sum(dim=0)

    def encoder(self) -> EncoderWeights:
        """The encoder's weights as the activation functions take them."""
        threshold = self.threshold
        match self.config.b_in:
            case "none":
                b_in = None
            case "b_dec":
                b_in = self.b_dec
            case "own":
                b_in = self.b_in
        if isinstance(self.config.activation, Gated):
            b_gate, scale = self.get_parameter("b_gate"), self.get_parameter("r_mag").exp()
            magnitude = Magnitude(scale, self.get_parameter("b_mag") - b_gate * scale)
            return EncoderWeights(self.enc_rows, b_gate, b_in, magnitude=magnitude)
        if not self.config.gate_by_decoder_norm:
            return EncoderWeights(self.enc_rows, self.b_enc, b_in, threshold)
        norms = self.decoder_norms()
        rows, bias = self.enc_rows * norms[:, None], self.b_enc * norms
        # a latent with no direction has the activation 0 rather than 0 / 0
        divisor = norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return EncoderWeights(rows, bias, b_in, threshold, norms=divisor)

    def encode(
        self, x: Float[Tensor, "*rows d_in"], read_out: ReadOutName | None = None
    ) -> Latents:
        """Sparse activations of rows in the model's units.

        The rows may stand in any axes, as (example, pos, d_in) does; the latents then do as well.

        Args:
            x: The rows.
            read_out: "linear", by the encoder alone, or "refined" (`sae.read_out`); linear unless
                the dictionary is one that `reading("refined")` gave.

        Raises:
            TypeError: If x is no tensor.
            ValueError: If the rows are not d_in wide, or the refined read-out was never set.
        """
        u, read_by = self.scaled(_flat(x, "x")), checked(read_out or self.read_by)
        latents = self.encode_scaled(u) if read_by == "linear" else self._encode_refined(u)
        if x.dim() == 2:
            return latents
        return Latents(*(part.view(*x.shape[:-1], part.shape[1]) for part in latents))

    def _encode_refined(self, u: Float[Tensor, "batch d_in"]) -> Latents:
        read_out = self.require_read_out()
        return encode_refined(self.config.activation, u, self.encoder(), self.decoder(), read_out)

    def decoder(self) -> Decoder:
        """What takes latents back to the rows that they were read from, for `sae.read_out`."""
        return Decoder(self.dec_rows, self.b_dec, self.config.scale_out / self.config.input_scale)

    def encode_scaled(self, u: Float[Tensor, "batch d_in"]) -> Latents:
        """Sparse activations of rows in the dictionary's units."""
        return activations.encode(self.config.activation, u, self.encoder())

    def encode_dense(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """The same activations as dense rows; only for those who need all of d_sae."""
        if self.read_by == "refined":
            latents = self.encode(_flat(x, "x"))
            dense = activations.to_dense(latents, self.config.d_sae)
        else:
            dense = self.encode_dense_scaled(self.scaled(_flat(x, "x")))
        return dense if x.dim() == 2 else dense.view(*x.shape[:-1], dense.shape[1])

    def encode_dense_scaled(self, u: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Dense activations of rows in the dictionary's units."""
        return activations.encode_dense(self.config.activation, u, self.encoder())

    def decode(
        self,
        acts: Latents | Float[Tensor, "*rows d_sae"],
        x: Float[Tensor, "*rows d_in"] | None = None,
    ) -> Float[Tensor, "*rows d_out"]:
        """Reconstruction in the model's units, from sparse or dense activations.

        Args:
            acts: Activations, in any axes.
            x: The rows they are of, in the model's units; only a dictionary with a skip or a norm
                of its input needs them.

        Raises:
            ValueError: If the rows are needed and missing.
        """
        if isinstance(acts, Latents):
            axes, flat = acts.values.shape[:-1], Latents(*(_flat(part, "acts") for part in acts))
        else:
            flat, axes = _flat(acts, "acts"), acts.shape[:-1]
        x_hat = self._decode(flat, None if x is None else _flat(x, "x"))
        return x_hat if len(axes) == 1 else x_hat.view(*axes, x_hat.shape[1])

    def _decode(
        self, acts: Latents | Float[Tensor, "batch d_sae"], x: Float[Tensor, "batch d_in"] | None
    ) -> Float[Tensor, "batch d_out"]:
        scale = _scales(self.config.slices_out, self.config.scale_out, self.b_dec)
        if not self.config.decode_needs_rows:
            return self.decode_scaled(acts) / scale
        norm = self.output_norm(self._rows(x))
        return (
            self.decode_scaled(acts, self.skip_input(self._rows(x))) / scale * norm.size + norm.mean
        )

    def decode_scaled(
        self,
        acts: Latents | Float[Tensor, "batch d_sae"],
        u: Float[Tensor, "batch d_in"] | None = None,
    ) -> Float[Tensor, "batch d_out"]:
        """Reconstruction in the dictionary's units: y = a @ W_dec + b_dec (+ u @ W_skip)."""
        if isinstance(acts, Latents):
            y = sparse_decode(acts.values, acts.indices, self.dec_rows, self.b_dec)
        else:
            y = torch.addmm(self.b_dec, acts, self.dec_rows)
        return y + self.skipped(self._rows(u)) if self.config.skip else y

    def skip_input(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """What the skip reads: u, or rows without their norm where the output does not undo it."""
        scale = _scales(self.config.slices_in, self.config.input_scale, self.enc_rows)
        return self.scaled(x) if self.config.undo_norm else x.to(self.enc_rows.dtype) * scale

    def skipped(self, u: Float[Tensor, "batch d_in"]) -> float | Float[Tensor, "batch d_out"]:
        """What goes past the latents, u @ W_skip; 0 without a skip."""
        return u @ self.skip_rows.T if self.config.skip else 0.0

    def _rows(self, x: Float[Tensor, "batch d_in"] | None) -> Float[Tensor, "batch d_in"]:
        if x is None:
            form = f"skip={self.config.skip}, input_norm={self.config.input_norm!r}"
            raise MonosemaError(f"decode must be given the rows x with {form}, got none; pass them")
        return x

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """Reconstruction of rows, both in the model's units and in the same axes."""
        is_sparse = self.config.activation.facts.trains == "sparse" or self.read_by == "refined"
        return self.decode(self.encode(x) if is_sparse else self.encode_dense(x), x)

    def output_norm(self, x: Float[Tensor, "batch d_in"]) -> TokenNorm:
        """What brings the output back to the model's units, of rows that are read."""
        return self.token_norm(x) if self.config.undo_norm else TokenNorm(0.0, 1.0)

    def token_norm(self, x: Float[Tensor, "batch d_in"]) -> TokenNorm:
        """What the norm of the input takes from rows in the model's units, in fp32 at least."""
        widths = [part.width for part in self.config.slices_in]
        if len(widths) == 1 or self.config.input_norm == "none":
            return self._token_norm(x)
        norms = [self._token_norm(part) for part in x.split(widths, dim=1)]
        whole = (
            torch.cat([torch.as_tensor(p).expand(len(x), w) for p, w in pairs], dim=1)
            for pairs in (zip(parts, widths, strict=True) for parts in zip(*norms, strict=True))
        )
        return TokenNorm(*whole)

    def _token_norm(self, x: Float[Tensor, "batch _"]) -> TokenNorm:
        x = x.to(self.enc_rows.dtype)
        match self.config.input_norm:
            case "none":
                return TokenNorm(0.0, 1.0)
            case "rms":
                return TokenNorm(0.0, x.square().mean(dim=-1, keepdim=True).sqrt())
            case "layer_norm":  # with n - 1, as the dictionaries that were released have it
                return TokenNorm(x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True))

    def scaled(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Rows in the dictionary's units, u = input_norm(x) * input_scale, in fp32 at least.

        Raises:
            ValueError: If the rows are not d_in wide.
        """
        if x.shape[-1] != self.config.d_in:
            raise MonosemaError(f"rows must be d_in={self.config.d_in} wide, got {tuple(x.shape)}")
        u = x.to(self.enc_rows.dtype)
        scale = _scales(self.config.slices_in, self.config.input_scale, u)
        if self.config.input_norm == "none":
            return u * scale
        mean, size = self.token_norm(x)
        assert isinstance(size, Tensor), size
        is_rms = self.config.input_norm == "rms"
        return (u - mean) / (size.clamp_min(NORM_EPS) if is_rms else size + NORM_EPS) * scale

    def scaled_out(self, x: Float[Tensor, "batch d_out"]) -> Float[Tensor, "batch d_out"]:
        """Rows that are to be predicted, in the dictionary's units: what y is compared with.

        Raises:
            ValueError: If the rows are not d_out wide.
        """
        if x.shape[-1] != self.config.width_out:
            width = self.config.width_out
            raise MonosemaError(f"predicted rows must be d_out={width} wide, got {tuple(x.shape)}")
        v = x.to(self.dec_rows.dtype)
        return v * _scales(self.config.slices_out, self.config.scale_out, v)


def _flat(x: Shaped[Tensor, "*rows width"], name: str) -> Shaped[Tensor, "batch width"]:
    """The rows of a tensor of any axes; a class or shape that has none is refused."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() == 0:
        raise MonosemaError(f"{name} must have rows, got a tensor without dimensions")
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _scales(
    slices: tuple[Slice, ...], scale: float, like: Float[Tensor, "*any"]
) -> float | Float[Tensor, " d_in"]:
    """The factor of all columns, or of each where there are several slices."""
    if len(slices) == 1:
        return scale * slices[0].scale
    return torch.cat([like.new_full((part.width,), scale * part.scale) for part in slices])


@torch.no_grad()
def initialise(
    dictionary: SparseAutoencoder,
    generator: torch.Generator,
    *,
    mean: Float[Tensor, " d_out"] | None = None,
    mean_in: Float[Tensor, " d_in"] | None = None,
    decoder_norm: float = 1.0,
) -> None:
    """Random decoder directions of one norm, the encoder their transpose, b_dec the mean.

    Where other hook points are predicted than are read the encoder has directions of its own. The
    other biases, r_mag and the skip are 0.

    Args:
        dictionary: What is filled, in place.
        generator: The only source of randomness.
        mean: Mean of the predicted rows in the model's units; b_dec is 0 without it.
        mean_in: Mean of the rows that are read, for a b_in of its own; 0 without it.
        decoder_norm: Norm of every row of the decoder and of the encoder.
    """
    config = dictionary.config
    rows = torch.randn(dictionary.dec_rows.shape, generator=generator)
    rows = rows / rows.norm(dim=1, keepdim=True) * decoder_norm
    dictionary.dec_rows.copy_(rows)
    if dictionary.enc_rows.shape == rows.shape and not config.outputs:
        dictionary.enc_rows.copy_(rows)
    else:
        fresh = torch.randn(dictionary.enc_rows.shape, generator=generator)
        dictionary.enc_rows.copy_(fresh / fresh.norm(dim=1, keepdim=True) * decoder_norm)
    for name, parameter in dictionary.named_parameters():
        if name not in ("enc_rows", "dec_rows", "threshold"):
            parameter.zero_()
    if mean is not None:
        dictionary.b_dec.copy_(mean * _scales(config.slices_out, config.scale_out, mean))
    if mean_in is not None and config.b_in == "own":
        scale = _scales(config.slices_in, config.input_scale, mean_in)
        dictionary.b_in.copy_(mean_in * scale)
