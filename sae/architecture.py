"""What an autoencoder is, as frozen configs; no torch here, so configs are checked at once.

u = x * input_scale;  h = (u - b_in) @ W_enc + b_enc;  a = activation(h);
y = a @ W_dec + b_dec;  x_hat = y / input_scale.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ReLU:
    """a = max(h, 0); how many latents fire is decided by the sparsity penalty."""

    kind: Literal["relu"] = "relu"
    """Tells the activations apart."""


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The k largest h of each row, cut at 0 (Gao et al. 2024, arXiv 2406.04093)."""

    kind: Literal["topk"] = "topk"
    """Tells the activations apart."""
    k: int = 32
    """Latents that may fire in one row."""

    def __post_init__(self) -> None:
        """Check k, as far as it can be without d_sae."""
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")


Activation = ReLU | TopK


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """The shape and the functional form of one dictionary."""

    d_in: int
    """Width of the rows that are read."""
    d_sae: int
    """Number of latents."""
    d_out: int | None = None
    """Width of the rows that are predicted; d_in when absent."""
    activation: Activation = TopK()
    """Which latents fire."""
    b_in: Literal["none", "b_dec"] = "b_dec"
    """What is subtracted before the encoder: nothing, or the decoder's bias."""
    input_scale: float = 1.0
    """The factor that brings the model's rows to the dictionary's units."""

    def __post_init__(self) -> None:
        """Check the sizes, and the fields against each other."""
        for name in ("d_in", "d_sae"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_out is not None and self.d_out < 1:
            raise ValueError(f"d_out must be at least 1, got {self.d_out}")
        if self.b_in == "b_dec" and self.width_out != self.d_in:
            raise ValueError(
                f"b_in must be 'none' where d_out={self.d_out} differs from d_in={self.d_in}, "
                "got 'b_dec'"
            )
        if not (math.isfinite(self.input_scale) and self.input_scale > 0):
            raise ValueError(f"input_scale must be a positive number, got {self.input_scale}")
        if isinstance(self.activation, TopK) and self.activation.k > self.d_sae:
            raise ValueError(
                f"activation.k must be at most d_sae={self.d_sae}, got {self.activation.k}"
            )

    @property
    def width_out(self) -> int:
        """d_out, or d_in where d_out is absent."""
        return self.d_in if self.d_out is None else self.d_out
