"""Which unit of one space is which of another: correlations over shared rows, one to one."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor


class Match(NamedTuple):
    """A one-to-one assignment of units."""

    x: Int64[Tensor, " pair"]
    """Units of the first space, ascending."""
    y: Int64[Tensor, " pair"]
    """The unit of the second space that each is matched with."""
    values: Float64[Tensor, " pair"]
    """How alike they are."""


class Correlations:
    """Pearson correlation of every unit of one space with every unit of another, streamed."""

    def __init__(self, d_in: int, d_out: int) -> None:
        """Start with no rows; memory is one (d_in, d_out) matrix of float64."""
        self.n_rows = 0
        self._mean_x = torch.zeros(d_in, dtype=torch.float64)
        self._mean_y = torch.zeros(d_out, dtype=torch.float64)
        self._spread_x = torch.zeros(d_in, dtype=torch.float64)
        self._spread_y = torch.zeros(d_out, dtype=torch.float64)
        self._cross = torch.zeros(d_in, d_out, dtype=torch.float64)

    def update(self, x: Float[Tensor, "batch d_in"], y: Float[Tensor, "other d_out"]) -> None:
        """Add the activations of the same rows in both spaces.

        Raises:
            ValueError: If they are not of the same rows.
        """
        if len(x) != len(y):
            raise ValueError(
                f"x and y must be of the same rows, got {len(x)} and {len(y)}; pair them first"
            )
        if len(x) == 0:
            return
        batch = Correlations(x.shape[1], y.shape[1])
        a, b = x.detach().double(), y.detach().double()
        batch.n_rows = len(a)
        batch._mean_x, batch._mean_y = a.mean(dim=0), b.mean(dim=0)
        a, b = a - batch._mean_x, b - batch._mean_y
        batch._spread_x, batch._spread_y = a.square().sum(dim=0), b.square().sum(dim=0)
        batch._cross = a.T @ b
        self.merge(batch)

    def merge(self, other: "Correlations") -> None:
        """Add the rows that `other` has seen (Chan et al. 1979)."""
        total = self.n_rows + other.n_rows
        if total == 0:
            return
        step_x, step_y = other._mean_x - self._mean_x, other._mean_y - self._mean_y
        between = self.n_rows * other.n_rows / total
        self._spread_x += other._spread_x + step_x.square() * between
        self._spread_y += other._spread_y + step_y.square() * between
        self._cross += other._cross + step_x[:, None] * step_y * between
        self._mean_x += step_x * (other.n_rows / total)
        self._mean_y += step_y * (other.n_rows / total)
        self.n_rows = total

    def compute(self) -> Float64[Tensor, "d_in d_out"]:
        """Correlations; 0 for a unit that does not vary."""
        size = self._spread_x.sqrt()[:, None] * self._spread_y.sqrt()
        return (self._cross / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp(-1, 1)


def match(values: Float[Tensor, "d_in d_out"]) -> Match:
    """The assignment of the largest sum, each unit used at most once (Hungarian, exact).

    It takes about n^3 steps: seconds at 4,000 units, an hour beyond 16,000.
    """
    rows, columns = (torch.from_numpy(n).long() for n in _assignment(values))
    return Match(rows, columns, values[rows, columns].double())


def _assignment(values: Float[Tensor, "d_in d_out"]) -> tuple:
    return linear_sum_assignment(values.detach().double().cpu().numpy(), maximize=True)
