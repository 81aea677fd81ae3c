"""An independent oracle for the top-k rule, and a meter for the largest temporary."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def best_of_row(row: list[float], k: int) -> list[int]:
    """Order a row by Python's stable sort: value descending with NaN first, index ascending."""
    rank = [(-math.inf, 0) if math.isnan(v) else (-v, 1) for v in row]
    return sorted(range(len(row)), key=lambda i: (rank[i], i))[:k]


@pytest.fixture(scope="session")
def oracle() -> Callable[[Tensor, int], Tensor]:
    """The k winners of each row, best first."""
    return lambda pre, k: torch.tensor([best_of_row(row, k) for row in pre.double().tolist()])


def storage(tensor: Tensor) -> int:
    """The address of a tensor's memory."""
    return tensor.untyped_storage().data_ptr()


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at the memory behind what it returns, if it is new."""
        given = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and storage(leaf) not in given:
                self.seen = max(self.seen, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.fixture
def largest() -> LargestTensor:
    """A meter, entered with `with`."""
    return LargestTensor()


@pytest.fixture(scope="session")
def shipped() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The function as users get it, without the annotation checks of the test run."""
    return inspect.unwrap


@pytest.fixture(scope="session")
def normal() -> Callable[..., Tensor]:
    """Standard normal numbers of a shape, a function of the seed."""

    def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw
