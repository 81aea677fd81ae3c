"""What a case of the suite is: inputs, candidates, and how to tell that a result is right."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = tuple[Tensor, ...]


class Shape(NamedTuple):
    """Widths of a training step."""

    d_model: int
    d_sae: int
    k: int
    batch: int = 8192

    def __str__(self) -> str:
        return f"d={self.d_model} M={self.d_sae} k={self.k} N={self.batch}"


class Variant(NamedTuple):
    """One way to compute the op, and the largest relative error that is right for it."""

    run: Callable[..., Any]
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op at a shape, its least work, and its candidates by name."""

    op: str
    shape: Shape
    dtype: torch.dtype
    n_bytes: float
    flops: float
    make: Callable[[int], Inputs]
    """Inputs from a seed."""
    error: Callable[[Inputs, Any], float]
    """The relative error of a result against float64, on a part of the rows."""
    candidates: dict[str, Variant]
    pattern: str = "uniform"
    in_place: bool = False
    """Whether the candidates write to their inputs."""


def rows_checked(batch: int) -> Tensor:
    """Rows that the gate looks at: 32 over the whole batch, with the first and the last."""
    return torch.linspace(0, batch - 1, min(batch, 32)).long()


def relative(result: Tensor, right: Tensor) -> float:
    """The norm of the difference over the norm of what is right; infinite where NaN is."""
    error = (result.double() - right).norm() / right.norm().clamp_min(1e-300)
    return float(error) if bool(error.isfinite()) else float("inf")


def gate(case: Case, candidate: Variant) -> float:
    """Run a candidate on fresh inputs, with fresh memory full of NaN; return its error."""
    inputs = case.make(1234)
    given = tuple(tensor.clone() for tensor in inputs) if case.in_place else inputs
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        result = candidate.run(*given)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
    return case.error(inputs, result)
