from collections.abc import Callable

import pytest
import torch

D_IN, BATCH = 13, 101


@pytest.fixture(scope="session")
def planted() -> Callable[[int], list[torch.Tensor]]:
    """Batches (101, 13) of sparse mixes of 29 planted directions, far from the origin."""

    def batches(n: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        atoms = torch.randn(29, D_IN, generator=generator)
        out = []
        for _ in range(n):
            fires = torch.rand(BATCH, 29, generator=generator) < 0.07
            sizes = torch.rand(BATCH, 29, generator=generator) + 0.5
            out.append((fires * sizes) @ atoms + 3.0)
        return out

    return batches
