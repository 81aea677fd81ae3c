"""Every pair of several sets of rows by every measure of similarity, with its null and interval.

The measures are those of `similarity` and `alignment`; here they share what each set of rows needs
once, so that thirty layers can be held against each other. The null exchanges rows of one side. The
interval is a bootstrap over examples to first order: drawn are weights of rows, and what a measure
centres, ranks or rotates by stays as it is for all rows.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float32, Float64, Int
from scipy import stats
from torch import Tensor

from activations_cache.checks import Progress, silent
from monosema.checks import MonosemaError
from sae.evaluate.alignment import centred, match
from sae.evaluate.similarity import (
    Basis,
    basis_of,
    canonical,
    dissimilarities,
    doubly_centred,
    neighbours,
)

MeasureName = Literal[
    "cka", "cknna", "rsa", "distance correlation", "svcca", "pwcca", "procrustes", "matching"
]
PRODUCTS: tuple[MeasureName, ...] = ("cka", "rsa", "distance correlation")
"""Cosines of one (row, row) matrix of each side: the permutations of all pairs cost one product."""
COSTLY: tuple[MeasureName, ...] = ("svcca", "pwcca", "procrustes", "matching")
"""A decomposition or an assignment for each pair and permutation."""
MEASURES: tuple[MeasureName, ...] = (
    "cka", "cknna", "rsa", "distance correlation", "svcca", "pwcca", "procrustes", "matching",
)  # fmt: skip
COSTLY_PERMUTATIONS = 19
"""Of the costly measures at most: as many as a p of 0.05 takes."""
ROWS_AT_ONCE = 64
"""Of the matrices of all sets, while they are permuted."""


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """One measure of one pair; larger is more alike."""

    value: float
    low: float
    """Ends of the 95 % interval."""
    high: float
    chance: float
    """Mean over the permutations."""
    chance_high: float
    """95 % quantile over the permutations."""
    p: float
    """Share of the permutations, the identity among them, that reach the value."""
    n_permutations: int


class Draws(NamedTuple):
    """What is drawn once for all pairs and measures."""

    orders: Int[Tensor, "batch row"]
    """Permutations of the rows."""
    weights: Float64[Tensor, "batch_ row"]
    """How often each row is drawn, for each resample of the examples."""

    @classmethod
    def of(
        cls, example: Int[Tensor, " row"], n_permutations: int, n_draws: int, seed: int
    ) -> "Draws":
        """Draw permutations of rows, and resamples of the examples that they are of.

        Raises:
            ValueError: If there is no permutation or no resample.
        """
        for name, n in (("permutations", n_permutations), ("draws", n_draws)):
            if n < 1:
                raise MonosemaError(f"{name} must be at least 1, got {n}")
        generator = torch.Generator().manual_seed(seed)
        n_rows = len(example)
        orders = [torch.randperm(n_rows, generator=generator) for _ in range(n_permutations)]
        _, number = example.unique(return_inverse=True)
        n = int(number.max()) + 1
        drawn = torch.randint(n, (n_draws, n), generator=generator)
        counts = torch.zeros(n_draws, n, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        return cls(torch.stack(orders), counts[:, number])


def compare(
    spaces: Mapping[str, Float[Tensor, "row _"]],
    pairs: Iterable[tuple[int, int]],
    measure: MeasureName,
    draws: Draws,
    *,
    k: int = 10,
    progress: Progress = silent,
) -> tuple[dict[tuple[int, int], Similarity], list[str]]:
    """One measure of pairs of sets, by their numbers, and why pairs have none.

    Args:
        spaces: Rows of the same examples, by name.
        pairs: Which are compared.
        measure: Which measure.
        draws: Permutations and resamples.
        k: Neighbours of cknna.
        progress: Called after each pair.

    Returns:
        Figures; and for pairs whose rows do not allow the measure, such as fewer rows than
        directions, the reasons.

    Raises:
        ValueError: If `k` is not in 1..rows - 1.
    """
    n_rows = len(next(iter(spaces.values())))
    if not 1 <= k < n_rows:
        raise MonosemaError(f"neighbours must be in 1..{n_rows - 1} for {n_rows} rows, got {k}")
    rows, pairs = [x.detach().double() for x in spaces.values()], list(pairs)
    n_permutations = len(draws.orders)
    if measure in PRODUCTS:
        matrices = _matrices(rows, measure, progress)
        nulls = _product_nulls(matrices, draws.orders, progress)
        prepared = Products(matrices)
    else:
        nulls, prepared = None, _prepared(rows, measure, k)
        limit = COSTLY_PERMUTATIONS if measure in COSTLY else n_permutations
        n_permutations = min(limit, n_permutations)
    results, problems = {}, []
    for done, (a, b) in enumerate(pairs, start=1):
        try:
            value = prepared.value(a, b)
        except MonosemaError as error:
            problems.append(str(error))
            continue
        if nulls is None:
            orders = draws.orders[:n_permutations]
            null = torch.tensor([prepared.value(a, b, order) for order in orders])
        else:
            null = nulls[:, a, b]
        resampled = prepared.resampled(a, b, draws.weights)
        results[a, b] = _judged(value, null.double(), resampled)
        progress(done, len(pairs), f"pairs by {measure}")
    return results, problems


def _judged(value: float, null: Tensor, resampled: Tensor) -> Similarity:
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    known = resampled[resampled.isfinite()]
    low, high = torch.quantile(known, ends).tolist() if len(known) else (math.nan, math.nan)
    reached = 1 + int((null >= value - 1e-12).sum())
    return Similarity(
        value=value, low=min(low, value), high=max(high, value), chance=float(null.mean()),
        chance_high=float(null.quantile(0.95)), p=reached / (1 + len(null)),
        n_permutations=len(null),
    )  # fmt: skip


def _matrices(
    rows: list[Float64[Tensor, "row _"]], measure: MeasureName, progress: Progress
) -> Float32[Tensor, "space row row"]:
    """One matrix of norm 1 for each set, whose cosine with another's is the measure."""
    results = torch.empty(len(rows), len(rows[0]), len(rows[0]))
    for i, x in enumerate(rows):
        if measure == "cka":
            kernel = centred(x) @ centred(x).T
            matrix = doubly_centred(kernel.fill_diagonal_(0), debiased=True)
        elif measure == "rsa":
            matrix = _ranks(dissimilarities(x))
        else:
            matrix = doubly_centred(dissimilarities(x), debiased=True)
        results[i] = matrix / matrix.norm()
        progress(i + 1, len(rows), f"sets of rows for {measure}")
    return results


def _ranks(distances: Float64[Tensor, "row row"]) -> Float64[Tensor, "row row"]:
    above = torch.triu_indices(len(distances), len(distances), offset=1).unbind()
    ranks = torch.from_numpy(stats.rankdata(distances[above].numpy()))
    result = torch.zeros_like(distances)
    result[above] = ranks - ranks.mean()
    return result + result.T


def _product_nulls(
    matrices: Float32[Tensor, "space row row"], orders: Int[Tensor, "batch row"], report: Progress
) -> Float64[Tensor, "batch space space"]:
    """Cosines of every matrix with every permuted one."""
    n_sets, n_rows = matrices.shape[:2]
    results = torch.zeros(len(orders), n_sets, n_sets, dtype=torch.float64)
    for done, order in enumerate(orders):
        for start in range(0, n_rows, ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            moved = matrices[:, order[part]].index_select(2, order)
            results[done] += matrices[:, part].flatten(1) @ moved.flatten(1).T
        report(done + 1, len(orders), "permutations")
    return results


class Products:
    """Cosine of two matrices whose diagonals are 0."""

    def __init__(self, matrices: Float32[Tensor, "space row row"]) -> None:
        """Take matrices of norm 1."""
        self._matrices = matrices
        self._sizes: dict[int, Tensor] = {}

    def value(self, a: int, b: int, order: Tensor | None = None) -> float:
        """The cosine."""
        other = self._matrices[b] if order is None else self._matrices[b][order][:, order]
        return float((self._matrices[a].double() * other.double()).sum())

    def resampled(self, a: int, b: int, weights: Tensor) -> Float64[Tensor, " batch"]:
        """The cosine with weights of pairs of rows."""
        for one in (a, b):
            if one not in self._sizes:
                self._sizes[one] = self._weighted(one, one, weights)
        return self._weighted(a, b, weights) / (self._sizes[a] * self._sizes[b]).sqrt()

    def _weighted(self, a: int, b: int, weights: Tensor) -> Float64[Tensor, " batch"]:
        w = weights.float()
        return ((w @ (self._matrices[a] * self._matrices[b])) * w).sum(dim=1).double()


class Neighbourhoods:
    """CKNNA; the neighbours stay those of all rows when rows are drawn."""

    def __init__(self, rows: list[Float64[Tensor, "row _"]], k: int) -> None:
        """Take the sets and the number of neighbours."""
        kernels = (centred(x) @ centred(x).T for x in rows)
        self._sides = [(kernel, *neighbours(kernel, k)) for kernel in kernels]
        self._sizes: dict[tuple[int, int], Tensor] = {}

    def value(self, a: int, b: int, order: Tensor | None = None) -> float:
        """The figure of `similarity.cknna`."""
        one = torch.ones(1, len(self._sides[a][0]), dtype=torch.float64)
        return float(self._figure(a, b, order, one)[0])

    def resampled(self, a: int, b: int, weights: Tensor) -> Float64[Tensor, " batch"]:
        """The same with weights of rows."""
        return self._figure(a, b, None, weights)

    def _figure(self, a: int, b: int, order: Tensor | None, weights: Tensor) -> Tensor:
        for one in (a, b):
            if (one, len(weights)) not in self._sizes:
                self._sizes[one, len(weights)] = self._hsic(one, one, None, weights)
        sizes = self._sizes[a, len(weights)] * self._sizes[b, len(weights)]
        return self._hsic(a, b, order, weights) / sizes.clamp_min(0).sqrt()

    def _hsic(self, a: int, b: int, order: Tensor | None, weights: Tensor) -> Tensor:
        """The unbiased estimate over pairs that are neighbours on both sides."""
        n = len(self._sides[a][0])
        order = torch.arange(n) if order is None else order
        k, near, inside = self._sides[a]
        other, _, other_inside = self._sides[b]
        i = torch.arange(n).repeat_interleave(near.shape[1])
        j = near.flatten()
        both = other_inside[order[i], order[j]]
        i, j = i[both], j[both]
        back = inside[j, i] & other_inside[order[j], order[i]]
        x, y = k[i, j], other[order[i], order[j]]
        w = weights[:, i] * weights[:, j]
        n_rows = weights.sum(dim=1)
        total = (w[:, back] * (x * other[order[j], order[i]])[back]).sum(dim=1)
        sums = (w @ x) * (w @ y) / ((n_rows - 1) * (n_rows - 2))
        zeros = torch.zeros_like(weights)
        columns = zeros.index_add(1, j, weights[:, i] * x)
        rows = zeros.index_add(1, i, weights[:, j] * y)
        cross = (weights * columns * rows).sum(dim=1) * 2 / (n_rows - 2)
        return (total + sums - cross) / (n_rows * (n_rows - 3))


class Canonical:
    """Mean canonical correlation, or weighted by what each direction accounts for in x."""

    def __init__(self, bases: list[Basis], *, by_x: bool) -> None:
        """Take what is kept of each set."""
        self._bases, self._by_x = bases, by_x

    def value(self, a: int, b: int, order: Tensor | None = None) -> float:
        """The figure of `similarity.svcca` or `similarity.pwcca`."""
        x, y = self._bases[a], self._bases[b]
        y = y if order is None else Basis(y.q[order], y.rows)
        left, correlations, _ = canonical(x, y)
        return float(self._weights(x, left) @ correlations)

    def resampled(self, a: int, b: int, weights: Tensor) -> Float64[Tensor, " batch"]:
        """The figure moved along its influence function; the directions' weights stay."""
        x, y = self._bases[a], self._bases[b]
        left, correlations, right = canonical(x, y)
        u, v = x.q @ left, y.q @ right.T
        spread = correlations * (u.square() + v.square()) / 2
        influence = (u * v - spread) @ self._weights(x, left)
        moved = (weights - 1) @ influence
        return (self._weights(x, left) @ correlations + moved).clamp(0, 1)

    def _weights(self, x: Basis, left: Tensor) -> Float64[Tensor, " k"]:
        if not self._by_x:
            return torch.full((left.shape[1],), 1 / left.shape[1], dtype=torch.float64)
        sizes = ((x.q @ left).T @ x.rows).abs().sum(dim=1)
        return sizes / sizes.sum()


class Rotation:
    """1 - half the Procrustes distance: the nuclear norm of A^T B, both of norm 1."""

    def __init__(self, rows: list[Float64[Tensor, "row _"]]) -> None:
        """Take centred sets of norm 1."""
        self._rows = rows

    def value(self, a: int, b: int, order: Tensor | None = None) -> float:
        """The nuclear norm."""
        x, y = self._rows[a], self._rows[b]
        product = x.T @ y if order is None else x.float().T @ y.float()[order]
        return float(torch.linalg.svdvals(product).sum())

    def resampled(self, a: int, b: int, weights: Tensor) -> Float64[Tensor, " batch"]:
        """The same with weights of rows; the rotation stays."""
        x, y = self._rows[a], self._rows[b]
        u, _, v = torch.linalg.svd(x.T @ y, full_matrices=False)
        sizes = [weights @ side.square().sum(dim=1) for side in (x, y)]
        along = ((x @ u) * (y @ v.T)).sum(dim=1)
        return (weights @ along) / (sizes[0] * sizes[1]).sqrt()


class Matching:
    """Mean correlation of units that are matched one to one."""

    def __init__(self, rows: list[Float64[Tensor, "row _"]]) -> None:
        """Take sets whose columns are centred and of norm 1."""
        self._rows = rows

    def value(self, a: int, b: int, order: Tensor | None = None) -> float:
        """The mean over the units of the narrower set."""
        x, y = self._rows[a], self._rows[b]
        product = x.T @ y if order is None else x.float().T @ y.float()[order]
        return float(match(product).values.mean())

    def resampled(self, a: int, b: int, weights: Tensor) -> Float64[Tensor, " batch"]:
        """The same with weights of rows; the match stays."""
        x, y = self._rows[a], self._rows[b]
        units = match(x.T @ y)
        x, y = x[:, units.x], y[:, units.y]
        sizes = [(weights @ side.square()).clamp_min(1e-30) for side in (x, y)]
        return ((weights @ (x * y)) / (sizes[0] * sizes[1]).sqrt()).mean(dim=1)


def _prepared(
    rows: list[Float64[Tensor, "row _"]], measure: MeasureName, k: int
) -> Neighbourhoods | Canonical | Rotation | Matching:
    if measure == "cknna":
        return Neighbourhoods(rows, k)
    if measure == "svcca":
        return Canonical([basis_of(x, 0.99) for x in rows], by_x=False)
    if measure == "pwcca":
        return Canonical([basis_of(x, 1.0) for x in rows], by_x=True)
    if measure == "procrustes":
        return Rotation([centred(x) / centred(x).norm() for x in rows])
    return Matching([torch.nn.functional.normalize(centred(x), dim=0) for x in rows])
