"""Sparse operations for autoencoders with few active latents.

Weights are latent-major: `enc_rows (d_sae, d_in)` and `dec_rows (d_sae, d_out)` hold one
contiguous row per latent. Every op has a slow reference and a fast path, chosen by `backend=`.
"""

from sae_kernels.adam import latent_adam_
from sae_kernels.auxk import auxk
from sae_kernels.decode import sparse_decode
from sae_kernels.dense import DenseStep, dense_autoencode
from sae_kernels.encode import encode_group_max, encode_topk, screened_topk
from sae_kernels.grads import sparse_weight_grads
from sae_kernels.launch import Backend, WeightGrads
from sae_kernels.mse import DecodeLoss, sparse_decode_mse
from sae_kernels.screen import CertifiedTopK
from sae_kernels.select import TopKResult, topk_select
from sae_kernels.threshold import Csr, batch_topk, encode_batch_topk, encode_threshold

__all__ = [
    "Backend",
    "CertifiedTopK",
    "Csr",
    "DecodeLoss",
    "DenseStep",
    "TopKResult",
    "WeightGrads",
    "auxk",
    "batch_topk",
    "dense_autoencode",
    "encode_batch_topk",
    "encode_group_max",
    "encode_threshold",
    "encode_topk",
    "latent_adam_",
    "screened_topk",
    "sparse_decode",
    "sparse_decode_mse",
    "sparse_weight_grads",
    "topk_select",
]
