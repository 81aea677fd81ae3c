"""Sparse ops of autoencoders; they need nothing but torch and jaxtyping."""

from sae_kernels.auxk import auxk as auxk
from sae_kernels.decode import sparse_decode as sparse_decode
from sae_kernels.encode import encode_topk as encode_topk
from sae_kernels.grads import WeightGrads as WeightGrads
from sae_kernels.grads import sparse_weight_grads as sparse_weight_grads
from sae_kernels.launch import Backend as Backend
from sae_kernels.select import TopK as TopK
from sae_kernels.select import topk_select as topk_select
