"""A dictionary with the face that SAEBench's `custom_saes` have, to run it there where it is.

SAEBench reads `W_enc`, `W_dec`, `b_enc`, `b_dec`, `cfg`, `device`, `dtype`, and calls `encode`,
`decode` and `forward` on (..., d_in). It demands decoder rows of norm 1, so activations are given
times the norms. Nothing of SAEBench is imported; its core metrics (0.6.0) were run with this face.
"""

from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from monosema.checks import MonosemaError
from sae.autoencoder import SparseAutoencoder


class Config(SimpleNamespace):
    """Where and what a dictionary is; SAEBench adds attributes of its own."""

    def to_dict(self) -> dict[str, Any]:
        """The part that it writes beside its figures."""
        return {name: value for name, value in vars(self).items() if name != "metadata"}


class ForSAEBench(nn.Module):
    """`encode` gives a_i ||d_i||, `decode` takes them back, in the model's own units."""

    def __init__(
        self, dictionary: SparseAutoencoder, *, model_name: str, hook_name: str, hook_layer: int
    ) -> None:
        """Take a dictionary of one stream.

        Args:
            dictionary: What is wrapped.
            model_name: As TransformerLens calls the model.
            hook_name: As TransformerLens calls the place, such as `blocks.15.hook_resid_post`.
            hook_layer: Its layer.

        Raises:
            ValueError: If its rows go through a norm or a skip, which SAEBench's face has not.
        """
        super().__init__()
        if dictionary.config.decode_needs_rows:
            raise MonosemaError(
                "SAEBench must be given a dictionary that decodes from latents alone, got one with "
                "a skip or a norm of its input; evaluate it here"
            )
        self.dictionary = dictionary
        rows = dictionary.W_dec / dictionary.config.scale_out
        self.norms = rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
        self.W_dec = nn.Parameter(rows / self.norms[:, None], requires_grad=False)
        self.W_enc = nn.Parameter(dictionary.W_enc.clone(), requires_grad=False)
        b_enc = torch.zeros(len(rows)) if dictionary.b_enc is None else dictionary.b_enc.detach()
        self.b_enc = nn.Parameter(b_enc.clone(), requires_grad=False)
        b_dec = dictionary.b_dec.detach() / dictionary.config.scale_out
        self.b_dec = nn.Parameter(b_dec.clone(), requires_grad=False)
        self.cfg = Config(
            model_name=model_name,
            hook_name=hook_name,
            hook_layer=hook_layer,
            hook_head_index=None,
            d_in=dictionary.config.d_in,
            d_sae=dictionary.config.d_sae,
            architecture=dictionary.config.activation.kind,
            dtype="float32",
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.W_dec.dtype

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Dense activations times the norms of the decoder's rows."""
        acts = self.dictionary.encode_dense(x.flatten(0, -2).float()) * self.norms
        return acts.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstructions."""
        return acts @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstructions of rows."""
        return self.decode(self.encode(x))
