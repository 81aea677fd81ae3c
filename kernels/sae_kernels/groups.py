"""Encoder and group maxima in one op: of each of k groups of neighbours the largest fires.

    pre = (x - b_in) @ enc_rows.T + b_enc
    group g holds the latents g * d_sae / k .. (g + 1) * d_sae / k - 1

On equal values the lower index wins; NaN is larger than every number.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from sae_kernels.launch import check_k, choose
from sae_kernels.product import Encode, Kept, Product, Rule, check_encoder, dense_pre
from sae_kernels.select import TopK


def _maxima(pre: Float[Tensor, "batch d_sae"], k: int) -> TopK:
    size = pre.shape[1] // k
    best = pre.unflatten(1, (k, size)).max(dim=2)
    return TopK(best.values, best.indices + torch.arange(k, device=pre.device) * size)


def encode_group_max_reference(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
    relu: bool = True,
) -> TopK:
    """Go through the groups one by one; dense gradients."""
    pre = dense_pre(x, enc_rows, b_enc, b_in)
    size = pre.shape[1] // k
    indices = torch.stack([part.argmax(dim=1) for part in pre.split(size, dim=1)], dim=1)
    indices = indices + torch.arange(0, pre.shape[1], size, device=pre.device)
    values = pre.gather(1, indices)
    return TopK(values.relu() if relu else values, indices)


def _keep_maxima(product: Product, k: int, relu: bool) -> Kept:
    """Take the maxima of the product in chunks of rows that share one workspace."""
    batch, bias = len(product.x), product.bias
    values = torch.empty(batch, k, dtype=bias.dtype, device=bias.device)
    indices = torch.empty(batch, k, dtype=torch.int64, device=bias.device)
    for rows, pre in product.chunks():
        values[rows], indices[rows] = _maxima(pre, k)
    return Kept(values.relu_() if relu else values, indices)


def encode_group_max(
    x: Float[Tensor, "batch d_in"],
    enc_rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    b_in: Float[Tensor, " d_in"] | None = None,
    relu: bool = True,
    backend: str | None = None,
) -> TopK:
    """Encode and keep the largest pre-activation of each of k groups, without storing them all.

    The arithmetic, gradients and dtypes are those of `encode_topk`, and so are the arguments; k is
    the number of groups and divides d_sae. Selection is torch's on every device.

    Returns:
        values (batch, k) in float32 (float64 for float64) and int64 indices (batch, k), ascending.

    Raises:
        ValueError: if shapes, devices, k or the backend do not fit.
        TypeError: if the tensors are not floating point or differ in dtype.
    """
    check_encoder(x, enc_rows, b_enc, b_in)
    check_k(k, len(enc_rows))
    if len(enc_rows) % k:
        raise ValueError(f"k must divide d_sae={len(enc_rows)} into equal groups, got {k}")
    name = choose(x, backend)
    if name == "reference":
        return encode_group_max_reference(x, enc_rows, b_enc, k, b_in=b_in, relu=relu)
    rule = Rule(partial(_keep_maxima, k=k, relu=relu), relu, name)
    found = Encode.apply(x, enc_rows, b_enc, b_in, rule)
    return TopK(found[0], found[1])
