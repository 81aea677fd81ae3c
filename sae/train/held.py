"""What of the weights does not move: a frozen part, and what a cross-layer transcoder has not.

Baselines in which a random part never learns, or hardly (arXiv 2602.14111).

A cross-layer transcoder (Lindsey et al. 2025, Circuit Tracing) is a dictionary whose latents come
in as many blocks as it reads hook points. The latents of a block read one place and write to this
place and those after it; all their other weights are 0 and stay so. What it gives is the sum over
the blocks, its losses are joint, and top-k chooses among all latents.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from sae.architecture import SAEConfig
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
    dec_rows: Float[Tensor, "d_sae d_out"],
    anchor: Float[Tensor, "d_sae d_out"],
    taken: Bool[Tensor, ""] | None = None,
) -> None:
    """Turn rows that strayed back to a cosine of NEAR with their anchor, norms kept, in place."""
    norms = dec_rows.norm(dim=1, keepdim=True)
    unit = normalize(dec_rows)
    cosine = (unit * anchor).sum(dim=1, keepdim=True)
    aside = normalize(unit - cosine * anchor)
    turned = norms * (NEAR * anchor + (1 - NEAR**2) ** 0.5 * aside)
    strayed = cosine < NEAR if taken is None else (cosine < NEAR) & taken
    dec_rows.copy_(torch.where(strayed, turned, dec_rows))


def elsewhere(
    form: SAEConfig,
    enc_rows: Float[Tensor, "d_sae d_in"],
    dec_rows: Float[Tensor, "d_sae d_out"],
) -> Iterator[Float[Tensor, "block _"]]:
    """Yield views of all weights that a cross-layer transcoder has not."""
    widths_in = [part.width for part in form.slices_in]
    widths_out = [part.width for part in form.slices_out]
    blocks = zip(enc_rows.chunk(len(widths_in)), dec_rows.chunk(len(widths_in)), strict=True)
    for number, (reads, writes) in enumerate(blocks):
        parts = reads.split(widths_in, dim=1)
        yield from parts[:number] + parts[number + 1 :]
        yield from writes.split(widths_out, dim=1)[:number]


@torch.no_grad()
def blank_(autoencoder: SparseAutoencoder) -> None:
    """Set the weights that a cross-layer transcoder has not to 0; the rows keep their norms."""
    rows = (autoencoder.enc_rows, autoencoder.dec_rows)
    before = [weights.norm(dim=1, keepdim=True) for weights in rows]
    for part in elsewhere(autoencoder.config, *rows):
        part.zero_()
    for weights, norms in zip(rows, before, strict=True):
        now = weights.norm(dim=1, keepdim=True)
        weights.mul_(torch.where(now > 0, norms / now, 1.0))


@torch.no_grad()
def blank_gradients_(autoencoder: SparseAutoencoder) -> None:
    """Take out the gradients of those weights."""
    enc_rows, dec_rows = autoencoder.enc_rows.grad, autoencoder.dec_rows.grad
    if enc_rows is None or dec_rows is None:  # nothing fired
        return
    for part in elsewhere(autoencoder.config, enc_rows, dec_rows):
        part.zero_()
