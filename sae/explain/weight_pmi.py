"""Words for latents from weights alone: log p(c|w), the mutual-information form that works."""

import torch
from jaxtyping import Float
from torch import Tensor


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
