"""Baselines in which a random part never learns, or hardly (arXiv 2602.14111)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig

NEAR = 0.8
"""Cosine below which no row of a softly frozen decoder may fall with its first direction."""


def freeze(autoencoder: SparseAutoencoder, frozen: str) -> None:
    """Let the decoder's or the encoder's rows take no gradient, in place."""
    autoencoder.dec_rows.requires_grad_(frozen != "decoder")
    autoencoder.enc_rows.requires_grad_(frozen != "encoder")


def anchor_of(
    autoencoder: SparseAutoencoder, config: DictionaryConfig
) -> Float[Tensor, "d_sae d_out"] | None:
    """The directions that a softly frozen decoder stays near to: those that it has now."""
    if config.frozen != "soft_decoder":
        return None
    return normalize(autoencoder.dec_rows.detach())


@torch.no_grad()
def keep_near_(
    dec_rows: Float[Tensor, "d_sae d_out"], anchor: Float[Tensor, "d_sae d_out"]
) -> None:
    """Turn rows that strayed back to a cosine of NEAR with their anchor, norms kept, in place."""
    norms = dec_rows.norm(dim=1, keepdim=True)
    unit = normalize(dec_rows)
    cosine = (unit * anchor).sum(dim=1, keepdim=True)
    aside = normalize(unit - cosine * anchor)
    turned = norms * (NEAR * anchor + (1 - NEAR**2) ** 0.5 * aside)
    dec_rows.copy_(torch.where(cosine < NEAR, turned, dec_rows))
