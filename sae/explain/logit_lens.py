"""Which tokens a latent's decoder row makes more and less likely, seen through the unembedding.

Words for latents from weights alone: log p(c|w), the mutual-information form that works.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations_cache.checks import MonosemaError, Progress, silent
from sae.autoencoder import SparseAutoencoder

_CELLS = 1 << 25  # logits held at once: 128 MiB


class PromotedTokens(NamedTuple):
    """The tokens at both ends of every latent's logits, the strongest first."""

    promoted: Int[Tensor, "d_sae k"]
    """Ids of the tokens with the largest logits."""
    promoted_logits: Float[Tensor, "d_sae k"]
    """Their logits, per unit of activation."""
    suppressed: Int[Tensor, "d_sae k"]
    """Ids of the tokens with the smallest logits, the most negative first."""
    suppressed_logits: Float[Tensor, "d_sae k"]
    """Their logits."""
    with_final_norm: bool
    """Whether the directions were multiplied by the final norm's weight."""


@torch.no_grad()
def promoted_tokens(
    dictionary: SparseAutoencoder,
    unembed: Float[Tensor, "vocab d_model"],
    final_norm_weight: Float[Tensor, " d_model"] | None,
    k: int = 10,
    *,
    progress: Progress | None = None,
) -> PromotedTokens:
    """The k tokens that each latent promotes and suppresses most, by the logit lens.

    logits = (direction * final_norm_weight) @ unembed.T: the direct path from the residual stream,
    leaving out the layers between and the norm's division, which changes the logits' scale only.

    Args:
        dictionary: Whose decoder rows are read, in the model's units; of several hook points the
            last one's part.
        unembed: The model's output embedding.
        final_norm_weight: Weight of the final RMS norm; without it the directions stay as they are.
        k: How many tokens at each end.
        progress: Called after each chunk with the number of latents done.

    Raises:
        ValueError: If widths differ or k is larger than the vocabulary.
    """
    widths = [part.width for part in dictionary.config.slices_out]
    directions = dictionary.directions.split(widths, dim=1)[-1]
    vocab, d_model = unembed.shape
    if directions.shape[1] != d_model:
        raise MonosemaError(
            f"unembed must be as wide as the decoder rows, {directions.shape[1]}, got {d_model}"
        )
    if not 1 <= k <= vocab:
        raise MonosemaError(f"k must lie between 1 and the vocabulary's size {vocab}, got {k}")
    if final_norm_weight is not None:
        directions = directions * final_norm_weight.to(directions)
    report = progress or silent
    readout = unembed.to(directions).T
    ends: list[tuple[Tensor, ...]] = []
    for chunk in directions.split(max(1, _CELLS // vocab)):
        logits = chunk @ readout  # (latents, vocab)
        high, low = logits.topk(k), logits.topk(k, largest=False)
        ends.append((high.indices, high.values, low.indices, low.values))
        report(sum(len(end[0]) for end in ends), len(directions), "latents through the logit lens")
    joined = [torch.cat(parts) for parts in zip(*ends, strict=True)]
    return PromotedTokens(*joined, with_final_norm=final_norm_weight is not None)


def weight_pmi(
    enc_rows: Float[Tensor, "d_sae d_in"], word_vectors: Float[Tensor, "word d_in"]
) -> Float[Tensor, "d_sae word"]:
    """Log p(c|w) + log d_sae, the pointwise mutual information under a uniform prior of latents.

    logits l_cw = <enc_c / |enc_c|, E_w>; p(c|w) is their softmax over latents. This is the second
    factor of the score of Wu et al. (2025, arXiv 2502.15576). Their whole score, p(w|c) log p(c|w)
    sorted descending, finds none of the planted words of our test, because log p(c|w) is negative
    and the least likely words win; log p(c|w) alone finds all.

    Args:
        enc_rows: Encoder directions.
        word_vectors: Mean embedding of each word's tokens.
    """
    logits = torch.nn.functional.normalize(enc_rows, dim=1) @ word_vectors.T
    return logits.log_softmax(dim=0) + torch.log(torch.tensor(float(len(enc_rows))))


def published_score(
    enc_rows: Float[Tensor, "d_sae d_in"], word_vectors: Float[Tensor, "word d_in"]
) -> Float[Tensor, "d_sae word"]:
    """p(w|c) log p(c|w) as it was released, for comparison; largest first."""
    logits = torch.nn.functional.normalize(enc_rows, dim=1) @ word_vectors.T
    return logits.softmax(dim=1) * logits.log_softmax(dim=0)
