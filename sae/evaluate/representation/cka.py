"""CKA and CKNNA: how alike the similarities are that two sets of rows give the same examples."""

import math

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from sae.evaluate.representation.paired import centred, paired


def cka(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"], *, debiased: bool = True
) -> float:
    """Linear centred kernel alignment, HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)).

    K = x x^T and L = y y^T (Kornblith et al. 2019, arXiv 1905.00414). With `debiased` HSIC is the
    unbiased estimate (Song et al. 2012), so that independent rows give 0 on average; the biased one
    gives independent 100 x 512 rows 0.84. Needs memory for three (row, row) matrices.

    Returns:
        1 for rows that are rotated, shifted or scaled copies; nan where a side does not vary.

    Raises:
        ValueError: If the sides do not have the same rows, or fewer than 4.
    """
    pair = paired(x, y, at_least=4)
    kernels = [centred(rows) @ centred(rows).T for rows in pair]
    hsic = unbiased_hsic if debiased else biased_hsic
    return _aligned(*(hsic(a, b) for a, b in _products(*kernels)))


def cknna(x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"], k: int = 10) -> float:
    """CKA over pairs of examples that are among each other's k nearest on both sides.

    Nearest by the inner product of centred rows (Huh et al. 2024, arXiv 2405.07987); with
    k = rows - 1 it is the debiased CKA.

    Raises:
        ValueError: If the sides do not have the same rows, or k is not in 1..rows - 1.
    """
    pair = paired(x, y, at_least=4)
    if not 1 <= k < len(pair.x):
        raise ValueError(f"k must be in 1..{len(pair.x) - 1} for {len(pair.x)} rows, got {k}")
    kernels = [centred(rows) @ centred(rows).T for rows in pair]
    near = [_nearest(kernel, k) for kernel in kernels]
    both = near[0] & near[1]
    masks = (both, near[0], near[1])
    products = zip(_products(*kernels), masks, strict=True)
    return _aligned(*(unbiased_hsic(a * mask, b * mask) for (a, b), mask in products))


def biased_hsic(k: Float64[Tensor, "row row"], l_: Float64[Tensor, "row row"]) -> float:
    """tr(K H L H) / (n - 1)^2 with H the centring matrix."""
    both = k - k.mean(dim=0) - k.mean(dim=1, keepdim=True) + k.mean()
    return float((both * l_).sum()) / (len(k) - 1) ** 2


def unbiased_hsic(k: Float64[Tensor, "row row"], l_: Float64[Tensor, "row row"]) -> float:
    """Song et al. 2012, equation 4: its mean over samples is 0 for independent sides."""
    n = len(k)
    k, l_ = (kernel - kernel.diag().diag() for kernel in (k, l_))
    total = (k * l_.T).sum() + k.sum() * l_.sum() / ((n - 1) * (n - 2))
    return float(total - 2 / (n - 2) * (k.sum(dim=0) @ l_.sum(dim=1))) / (n * (n - 3))


def _products(
    k: Float64[Tensor, "row row"], l_: Float64[Tensor, "row row"]
) -> tuple[tuple[Tensor, Tensor], ...]:
    return (k, l_), (k, k), (l_, l_)


def _aligned(between: float, of_x: float, of_y: float) -> float:
    product = of_x * of_y
    return between / math.sqrt(product) if product > 0 else math.nan


def _nearest(kernel: Float64[Tensor, "row row"], k: int) -> Bool[Tensor, "row row"]:
    """Which columns are the k largest of a row, itself left out."""
    others = kernel.clone().fill_diagonal_(-math.inf)
    return torch.zeros_like(kernel, dtype=torch.bool).scatter_(1, others.topk(k).indices, True)
