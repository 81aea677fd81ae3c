"""What every format is read into: weights by the names of the autoencoder's parameters."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architecture import SAEConfig, with_k
from sae.autoencoder import SparseAutoencoder
from sae.pretrained.foreign import DictionaryFormatError

SETTINGS = (".json", ".yaml")
"""Ends of the names of files without weights."""
WHOLE = ("b_dec", "b_in", "skip_rows")
"""Tensors that have no axis of latents."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of one dictionary, fp32, latent-major; None where the form has none."""

    enc_rows: Float[Tensor, "d_sae d_in"]
    """Row i reads latent i."""
    dec_rows: Float[Tensor, "d_sae d_out"]
    """Row i is the direction of latent i."""
    b_dec: Float[Tensor, " d_out"]
    """Bias of the decoder."""
    b_enc: Float[Tensor, " d_sae"] | None = None
    """Bias of the encoder."""
    b_in: Float[Tensor, " d_in"] | None = None
    """What is subtracted from the input, if it is not b_dec."""
    threshold: Float[Tensor, "*d_sae"] | None = None
    """JumpReLU's (d_sae,), or BatchTopK's single one ()."""
    skip_rows: Float[Tensor, "d_out d_in"] | None = None
    """y += u @ skip_rows.T."""
    b_gate: Float[Tensor, " d_sae"] | None = None
    """Gated: bias of the gate."""
    b_mag: Float[Tensor, " d_sae"] | None = None
    """Gated: bias of the magnitude."""
    r_mag: Float[Tensor, " d_sae"] | None = None
    """Gated: logarithm of the magnitude's factor."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.dec_rows.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.enc_rows.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.dec_rows.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One dictionary as a format's reader hands it over."""

    config: SAEConfig
    """Its form."""
    weights: Weights
    """Its tensors."""
    folds: tuple[str, ...] = ()
    """What was multiplied into the weights, or dropped because it does nothing."""
    site: dict[str, str] = field(default_factory=dict)
    """What the files say of the model, the hook points and the rows, in their own words."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What our own files say of how it came about."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a dictionary comes from; for the provenance of what is made of it."""

    source_format: str
    """Name of the format."""
    source_path: str
    """The path or the hub's name, with the commit."""
    source_sha256: dict[str, str]
    """File name -> SHA-256 of every file that was read."""
    folds_applied: tuple[str, ...] = ()
    """As in Reading."""
    site: dict[str, str] = field(default_factory=dict)
    """As in Reading."""
    checked_against: str = ""
    """What the format's reader was compared with; no reader was run on released weights yet."""

    @property
    def weights_sha256(self) -> str:
        """The SHA-256 of the file of weights; of several files, that of their names and hashes."""
        return weights_sha256(self.source_sha256)


def weights_sha256(sha256: Mapping[str, str]) -> str:
    """The SHA-256 of the one file of weights among some; of several, that of names and hashes."""
    files = {name: digest for name, digest in sha256.items() if not name.endswith(SETTINGS)}
    if len(files) == 1:
        return next(iter(files.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def selected(latents: int | slice | None, d_sae: int) -> slice:
    """Return the latents that are asked for as a slice with both ends.

    Raises:
        DictionaryFormatError: If there are none among d_sae, or if they do not ascend.
    """
    chosen = slice(latents, latents + 1) if isinstance(latents, int) else latents or slice(None)
    result = range(d_sae)[chosen]
    is_outside = isinstance(latents, int) and not 0 <= latents < d_sae
    if is_outside or not result or result.step < 1:
        raise DictionaryFormatError(
            f"latents must select ascending ones of 0 to {d_sae - 1}, got {latents}"
        )
    return slice(result.start, result.stop, result.step)


def in_memory(weights: Weights, latents: int | slice | None = None) -> Weights:
    """Take weights as they lie in a file, in their own dtype, into memory as fp32.

    Args:
        weights: Tensors that may be views of a mapped file; the others of the latents are not read.
        latents: Which latents to take; all when absent.

    Raises:
        DictionaryFormatError: If a number is not finite, or for latents that are not there.
    """
    chosen = selected(latents, weights.d_sae)
    taken = {}
    for name, tensor in weights.tensors().items():
        if latents is not None and name not in WHOLE and tensor.dim():
            tensor = tensor[chosen].clone()
        if not bool(tensor.isfinite().all()):
            raise DictionaryFormatError(
                f"the tensor of {name} must hold finite numbers, got NaN or infinity"
            )
        taken[name] = tensor.to(torch.float32)
    return Weights(**taken)


def assemble(reading: Reading, latents: int | slice | None = None) -> SparseAutoencoder:
    """Make the autoencoder of what a reader hands over, which holds the chosen latents alone.

    Raises:
        DictionaryFormatError: If tensors, shapes and config do not fit each other.
    """
    chosen = selected(latents, reading.config.d_sae)
    config = narrowed(reading.config, len(range(reading.config.d_sae)[chosen]))
    tensors = reading.weights.tensors()
    expected = {name: tuple(p.shape) for name, p in empty(config).state_dict().items()}
    results = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if results != expected:
        raise DictionaryFormatError(f"the tensors must have the shapes {expected}, got {results}")
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise DictionaryFormatError(
                f"{name} must be finite after folding, got NaN or infinity: a factor in the files "
                "is out of all proportion"
            )
    dictionary = empty(config)
    dictionary.load_state_dict({n: t.contiguous() for n, t in tensors.items()}, assign=True)
    return dictionary.requires_grad_(True)


def empty(config: SAEConfig) -> SparseAutoencoder:
    """An autoencoder whose parameters have shapes only."""
    with torch.device("meta"):
        return SparseAutoencoder(config)


def narrowed(config: SAEConfig, d_sae: int) -> SAEConfig:
    """The config of a dictionary with fewer latents; k is cut to their number."""
    activation = config.activation
    if d_sae < config.d_sae and activation.facts.choice == "group":
        kind = activation.kind
        raise DictionaryFormatError(
            f"latents must be all {config.d_sae} for activation.kind {kind!r}, got {d_sae}; some "
            "of them alone would fire otherwise"
        )
    if (activation.per_row or 1) > max(d_sae, 1):
        activation = with_k(activation, max(d_sae, 1))
    return replace(config, d_sae=d_sae, activation=activation)
