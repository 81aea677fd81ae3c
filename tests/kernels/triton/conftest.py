"""What the kernels' tests share: sparse latents, and a relative error."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor


class Sparse(NamedTuple):
    values: Tensor
    indices: Tensor


@pytest.fixture(scope="session")
def sparse(normal) -> Callable[..., Sparse]:
    """Latents in the form that `topk_select` returns: distinct in a row, ascending."""

    def draw(batch: int, k: int, d_sae: int, dtype: torch.dtype = torch.float32) -> Sparse:
        picks = normal(batch, d_sae, seed=1).topk(k, dim=1).indices.sort(1).values
        return Sparse(normal(batch, k, seed=2, dtype=dtype), picks)

    return draw


@pytest.fixture(scope="session")
def error() -> Callable[[Tensor, Tensor], float]:
    """The norm of the difference over the norm of what is right (float64)."""

    def relative(result: Tensor, right: Tensor) -> float:
        assert result.shape == right.shape
        assert right.dtype == torch.float64
        return float((result.double() - right).norm() / right.norm())

    return relative
