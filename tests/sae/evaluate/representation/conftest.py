import pytest
import torch


@pytest.fixture
def draw():
    """Standard normal rows in float64."""

    def rows(n, d, seed=0):
        return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return rows


@pytest.fixture
def rotation(draw):
    """A random orthogonal matrix."""
    return lambda d, seed=9: torch.linalg.qr(draw(d, d, seed)).Q
