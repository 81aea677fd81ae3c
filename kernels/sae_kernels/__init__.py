"""Sparse operations for autoencoders with few active latents.

Weights are latent-major: `enc_rows (d_sae, d_in)` and `dec_rows (d_sae, d_out)` hold one
contiguous row per latent. Every op has a slow reference and a fast path, chosen by `backend=`.
"""

from sae_kernels.auxk import auxk
from sae_kernels.decode import sparse_decode
from sae_kernels.encode import encode_topk
from sae_kernels.grads import WeightGrads, sparse_weight_grads
from sae_kernels.launch import Backend
from sae_kernels.select import TopK, topk_select

__all__ = [
    "Backend",
    "TopK",
    "WeightGrads",
    "auxk",
    "encode_topk",
    "sparse_decode",
    "sparse_weight_grads",
    "topk_select",
]
