"""What all measures of two sets of rows share: the check, centring, and the chance floor.

Which unit of one space is which of another: correlations over shared rows, one to one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Float64, Int, Int64
from scipy import linalg
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from activations_cache.checks import Progress
from monosema.checks import MonosemaError
from sae.statistics import each_on_a_core

PERMUTATIONS_AT_ONCE = 8
"""A row of the matrices of all sets, permuted so often, stays in a core's cache at 2,000 rows."""

Measure = Callable[[Tensor, Tensor], float]
"""From two sets of rows of the same examples to a figure."""


class Pair(NamedTuple):
    """Two sets of rows of the same examples, in float64."""

    x: Float64[Tensor, "row d_in"]
    y: Float64[Tensor, "row d_out"]


class Null(NamedTuple):
    """A figure beside what it is when rows of one side are exchanged at random."""

    value: float
    """The figure of the rows as they are paired."""
    floor: float
    """Mean over the permutations."""
    high: float
    """95 % quantile over the permutations."""
    p: float
    """Share of the permutations, the identity among them, that reach the figure."""


def paired(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"], at_least: int = 2
) -> Pair:
    """Both sides in float64.

    Raises:
        ValueError: If they do not hold the same examples, too few, or what is not finite.
    """
    if len(x) != len(y):
        raise MonosemaError(
            f"x and y must have a row for each of the same examples, got {len(x)} and {len(y)} rows"
        )
    if len(x) < at_least:
        raise MonosemaError(f"x and y must have at least {at_least} rows, got {len(x)}")
    for name, rows in (("x", x), ("y", y)):
        if not bool(rows.isfinite().all()):
            raise MonosemaError(f"{name} must be finite, got nan or inf; leave these rows out")
    return Pair(x.detach().double(), y.detach().double())


def centred(x: Float64[Tensor, "row d_in"]) -> Float64[Tensor, "row d_in"]:
    """Rows less their mean row."""
    return x - x.mean(dim=0)


def permutation_null(
    measure: Measure,
    x: Float[Tensor, "row d_in"],
    y: Float[Tensor, "row d_out"],
    *,
    n_permutations: int,
    generator: torch.Generator,
) -> Null:
    """Measure as paired, and with the rows of y exchanged: the chance floor of any measure.

    Args:
        measure: Larger must mean more alike.
        x: One side.
        y: The other side.
        n_permutations: How often the rows of y are exchanged.
        generator: The only source of randomness.

    Raises:
        ValueError: If there is no permutation, or the sides do not fit each other.
    """
    if n_permutations < 1:
        raise MonosemaError(f"n_permutations must be at least 1, got {n_permutations}")
    pair = paired(x, y)
    value = measure(*pair)
    result = torch.tensor(
        [
            measure(pair.x, pair.y[torch.randperm(len(x), generator=generator)])
            for _ in range(n_permutations)
        ],
        dtype=torch.float64,
    )
    reached = 1 + int((result >= value).sum())
    high = float(torch.quantile(result, 0.95))
    return Null(value, float(result.mean()), high, reached / (1 + n_permutations))


def product_nulls(
    left: Float32[Tensor, "space row row"],
    right: Float32[Tensor, "other row row"],
    orders: Int[Tensor, "batch row"],
    report: Progress,
) -> Float64[Tensor, "batch space other"]:
    """Inner products of every left matrix with every right one, permuted; all are symmetric."""
    n_rows, n_left, n_right = left.shape[1], len(left), len(right)
    # With the sets last a permutation moves runs of numbers and not single ones.
    moving = right.permute(1, 2, 0).contiguous()
    diagonal, other_diagonal = (side.diagonal(dim1=1, dim2=2).double() for side in (left, right))

    def of(batch: Tensor) -> Tensor:
        to, n = batch.T.contiguous(), len(batch)
        # A row is read as it lies in memory, and permuted in a core's cache.
        here, permuted = moving.new_empty(n, n_rows, n_right), moving.new_empty(n_rows * n, n_right)
        cells = (to + torch.arange(n) * n_rows).flatten()
        above = torch.zeros(n_left, n * n_right, dtype=torch.float64)
        for row in range(n_rows):
            torch.index_select(moving, 0, to[row], out=here)
            part = permuted[: (n_rows - row) * n]
            torch.index_select(here.view(-1, n_right), 0, cells[row * n :], out=part)
            above += left[:, row, row:] @ part.view(n_rows - row, -1)
        on = torch.einsum("lr,opr->plo", diagonal, other_diagonal[:, batch])
        return 2 * above.view(n_left, len(batch), n_right).transpose(0, 1) - on

    results: list[Tensor] = []
    for result in each_on_a_core(of, orders.split(PERMUTATIONS_AT_ONCE)):
        results += result
        report(len(results), len(orders), "permutations")
    return torch.stack(results)


def singular_values(matrix: Float[Tensor, "d_in d_out"]) -> Float[Tensor, " k"]:
    """In the dtype given; scipy's are the faster ones on a CPU."""
    return torch.from_numpy(linalg.svdvals(matrix.numpy(), check_finite=False))


def left_directions(matrix: Float32[Tensor, "d_in d_out"]) -> tuple[Tensor, Tensor]:
    """Left directions and singular values.

    From 64 on by the eigenvectors of M M^T, in two thirds of the time: of many the means agree to
    1e-6, of a few one near 0 counts.
    """
    n = min(matrix.shape)
    if n < 64:
        left, sizes, _ = torch.linalg.svd(matrix, full_matrices=False)
        return left, sizes
    squares, left = torch.linalg.eigh(matrix @ matrix.T)
    return left[:, -n:], squares[-n:].clamp_min(0).sqrt()


ROUNDING = 1e-4
"""Of a bound from sums in float32, relative and generous."""


def nuclear_limits(
    left: Float32[Tensor, "space row row"],
    right: Float32[Tensor, "other row row"],
    traces: Float64[Tensor, "#space #other"],
    orders: Int[Tensor, "batch row"],
    report: Progress,
) -> Float64[Tensor, "batch space other"]:
    """What no nuclear norm of x^T y exceeds, with the rows of y permuted, for all pairs of sides.

    It is at most sqrt(tr D) times the Frobenius norm of D^(-1/2) x^T y, for any positive D (Cauchy
    and Schwarz). The square of the latter is the inner product of x D^-1 x^T and the permuted
    y y^T: nothing is decomposed for a pair.

    Args:
        left: x D^-1 x^T of each side.
        right: y y^T of each side.
        traces: Of D, of each pair.
        orders: The permutations.
        report: Called after some of them.
    """
    squares = product_nulls(left, right, orders, report).clamp_min(0)
    return (squares * traces).sqrt() * (1 + ROUNDING)


class Rotation:
    """1 - half the Procrustes distance: the nuclear norm of A^T B, both of norm 1.

    Permuted sides are multiplied and decomposed in float32, within 1e-5 of float64.
    """

    def __init__(self, rows: list[Float64[Tensor, "row _"]]) -> None:
        """Take centred sets of norm 1."""
        self._rows, self._short = rows, [x.float() for x in rows]

    def null(self, a: int, b: int, orders: Tensor) -> Float64[Tensor, " batch"]:
        """The nuclear norm with the rows of b permuted."""
        x, y = self._short[a].T, self._short[b]
        return torch.stack([singular_values(x @ y[order]).double().sum() for order in orders])

    def limits(self, orders: Tensor, progress: Progress) -> Float64[Tensor, "batch space other"]:
        """What it does not exceed: D = (A^T A)^(1/2) is near to the best one for random rows."""
        parts = each_on_a_core(lambda x: torch.linalg.svd(x, full_matrices=False)[:2], self._rows)
        left, traces = zip(*(((u * s) @ u.T, s.sum()) for u, s in parts), strict=True)
        right = torch.stack([x @ x.T for x in self._short])
        by_left = torch.stack(traces)[:, None]
        return nuclear_limits(torch.stack(left).float(), right, by_left, orders, progress)

    def resampled(self, a: int, b: int, weights: Tensor) -> Float64[Tensor, " batch"]:
        """The nuclear norm with weights of rows; the rotation stays."""
        x, y = self._rows[a], self._rows[b]
        u, sizes, v = torch.linalg.svd(x.T @ y, full_matrices=False)
        norms = [weights @ side.square().sum(dim=1) for side in (x, y)]
        along = ((self._short[a] @ u.float()) * (self._short[b] @ v.T.float())).sum(dim=1)
        # the sum of `along` is that of `sizes`, which is of float64
        result = sizes.sum() + (weights - 1) @ along.double()
        return result / (norms[0] * norms[1]).sqrt()


class Products:
    """Cosine of two matrices whose diagonals are 0."""

    def __init__(self, matrices: Float32[Tensor, "space row row"]) -> None:
        """Take matrices of norm 1."""
        self._matrices = matrices
        self._sizes: dict[int, Tensor] = {}

    def value(self, a: int, b: int) -> float:
        """The cosine, summed in float64."""
        return float((self._matrices[a].double() * self._matrices[b].double()).sum())

    def nulls(self, orders: Tensor, progress: Progress) -> Float64[Tensor, "batch space space"]:
        """The cosines of all pairs with the rows of the second permuted."""
        return product_nulls(self._matrices, self._matrices, orders, progress)

    def resampled(self, a: int, b: int, weights: Tensor) -> Float64[Tensor, " batch"]:
        """The cosine with weights of pairs of rows."""
        for one in (a, b):
            if one not in self._sizes:
                self._sizes[one] = self._weighted(one, one, weights)
        return self._weighted(a, b, weights) / (self._sizes[a] * self._sizes[b]).sqrt()

    def _weighted(self, a: int, b: int, weights: Tensor) -> Float64[Tensor, " batch"]:
        w = weights.float()
        return ((w @ (self._matrices[a] * self._matrices[b])) * w).sum(dim=1).double()


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
            raise MonosemaError(
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


class Matching:
    """Mean correlation of units that are matched one to one."""

    def __init__(self, rows: list[Float64[Tensor, "row _"]]) -> None:
        """Take sets whose columns are centred and of norm 1."""
        self._rows = rows

    def null(self, a: int, b: int, orders: Tensor) -> Float64[Tensor, " batch"]:
        """The mean over the units of the narrower set, with the rows of b permuted."""
        x, y = self._rows[a].float().T, self._rows[b].float()
        return torch.stack([match(x @ y[order]).values.mean() for order in orders])

    def resampled(self, a: int, b: int, weights: Tensor) -> Float64[Tensor, " batch"]:
        """The mean with weights of rows; the match stays."""
        x, y = self._rows[a], self._rows[b]
        units = match(x.T @ y)
        x, y = x[:, units.x], y[:, units.y]
        sizes = [(weights @ side.square()).clamp_min(1e-30) for side in (x, y)]
        return ((weights @ (x * y)) / (sizes[0] * sizes[1]).sqrt()).mean(dim=1)
