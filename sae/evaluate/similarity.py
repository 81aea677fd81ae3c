"""CKA and CKNNA: how alike the similarities are that two sets of rows give the same examples.

SVCCA and PWCCA: correlations of the best matched directions of two sets of rows.

RSA: rank correlation of the dissimilarities that two sets of rows give the same examples.

Procrustes: how far two sets of rows are from rotated copies of each other.

Distance correlation: dependence of any kind between two sets of rows.
"""

import math
from typing import Literal, NamedTuple, assert_never

import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy import stats
from torch import Tensor

from activations_cache.checks import Progress
from monosema.checks import MonosemaError
from sae.evaluate.alignment import (
    centred,
    left_directions,
    nuclear_limits,
    paired,
    singular_values,
)


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
        raise MonosemaError(f"k must be in 1..{len(pair.x) - 1} for {len(pair.x)} rows, got {k}")
    kernels = [centred(rows) @ centred(rows).T for rows in pair]
    near = [neighbours(kernel, k)[1] for kernel in kernels]
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


def neighbours(
    kernel: Float64[Tensor, "row row"], k: int
) -> tuple[Int64[Tensor, "row k"], Bool[Tensor, "row row"]]:
    """The k largest columns of each row, itself left out: their numbers, and which they are."""
    near = kernel.clone().fill_diagonal_(-math.inf).topk(k).indices
    return near, torch.zeros_like(kernel, dtype=torch.bool).scatter_(1, near, True)


class Neighbourhoods:
    """CKNNA; the neighbours stay those of all rows when rows are drawn."""

    def __init__(self, rows: list[Float64[Tensor, "row _"]], k: int) -> None:
        """Take the sets and the number of neighbours."""
        kernels = (centred(x) @ centred(x).T for x in rows)
        self._sides = [(kernel, *neighbours(kernel, k)) for kernel in kernels]
        self._sizes: dict[tuple[int, int], Tensor] = {}

    def null(self, a: int, b: int, orders: Tensor) -> Float64[Tensor, " batch"]:
        """The figure with the rows of b permuted."""
        one = torch.ones(1, len(self._sides[a][0]), dtype=torch.float64)
        return torch.cat([self._figure(a, b, order, one) for order in orders])

    def resampled(self, a: int, b: int, weights: Tensor) -> Float64[Tensor, " batch"]:
        """The figure of `similarity.cknna` with weights of rows."""
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


SMALL = 1e-10
"""Singular values below this share of the largest one count as 0."""


class Basis(NamedTuple):
    """What is kept of one side."""

    q: Float64[Tensor, "row k"]
    """Orthonormal columns that span it."""
    rows: Float64[Tensor, "row d_in"]
    """The centred rows."""


def svcca(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"], *, variance: float = 0.99
) -> float:
    """Mean canonical correlation of the leading principal components of both sides.

    Kept are the fewest components with `variance` of each side's variance (Raghu et al. 2017, arXiv
    1706.05806).

    Raises:
        ValueError: If the sides do not have the same rows, `variance` is not in (0, 1], or there
            are too few rows for a correlation to say anything.
    """
    if not 0 < variance <= 1:
        raise MonosemaError(f"variance must be above 0 and at most 1, got {variance}")
    pair = paired(x, y)
    _, correlations, _ = canonical(basis_of(pair.x, variance), basis_of(pair.y, variance))
    return float(correlations.mean())


def pwcca(x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"]) -> float:
    """Canonical correlations weighted by how much of x each direction accounts for.

    weight_i = sum_j |<h_i, x_j>| over the columns x_j, h_i the i-th canonical variate of x (Morcos
    et al. 2018, arXiv 1806.05759). Not symmetric: the weights are those of x. The authors' code
    (google/svcca, `compute_pwcca`) weighs by projections of what it has cut down to the kept
    directions and gives other values, such as 0.7491 where the paper's formula gives 0.7231.

    Raises:
        ValueError: If the sides do not have the same rows, or too few of them.
    """
    pair = paired(x, y)
    basis = basis_of(pair.x, 1.0)
    left, correlations, _ = canonical(basis, basis_of(pair.y, 1.0))
    variates = basis.q @ left  # (row, k)
    weights = (variates.T @ basis.rows).abs().sum(dim=1)
    return float((weights * correlations).sum() / weights.sum())


def basis_of(rows: Float64[Tensor, "row d_in"], variance: float) -> Basis:
    """The fewest principal components with a share of the variance."""
    rows = centred(rows)
    u, sizes, _ = torch.linalg.svd(rows, full_matrices=False)
    share = sizes.square().cumsum(0) / sizes.square().sum()
    n_components = min(
        int((share < variance - 1e-12).sum()) + 1, int((sizes > SMALL * sizes[0]).sum())
    )
    return Basis(u[:, :n_components], rows)


def canonical(x: Basis, y: Basis) -> tuple[Tensor, Tensor, Tensor]:
    """Directions of x, correlations and directions of y, as a singular value decomposition.

    Raises:
        ValueError: If rows do not outnumber the directions of both sides.
    """
    n_rows, n_directions = len(x.q), x.q.shape[1] + y.q.shape[1]
    if min(x.q.shape[1], y.q.shape[1]) == 0 or n_rows <= n_directions:
        raise MonosemaError(
            f"canonical correlations must have more rows than directions of both sides "
            f"({n_directions}) and sides that vary, got {n_rows} rows; take more rows"
        )
    left, correlations, right = torch.linalg.svd(x.q.T @ y.q, full_matrices=False)
    return left, correlations.clamp_max(1), right


class Canonical:
    """Mean canonical correlation, or weighted by what each direction accounts for in x.

    Permuted sides are multiplied and decomposed in float32, within 1e-5 of float64.
    """

    def __init__(self, bases: list[Basis], *, by_x: bool) -> None:
        """Take what is kept of each set."""
        self._bases, self._by_x = bases, by_x
        self._short = [basis.q.float() for basis in bases]
        self._onto = [basis.q.T @ basis.rows for basis in bases] if by_x else []

    def null(self, a: int, b: int, orders: Tensor) -> Float64[Tensor, " batch"]:
        """The figure with the rows of b permuted."""
        x, y = self._short[a].T, self._short[b]
        results = torch.zeros(len(orders), dtype=torch.float64)
        for i, order in enumerate(orders):
            product = x @ y[order]
            if self._by_x:
                left, correlations = left_directions(product)
                results[i] = self._weights(a, left) @ correlations.double()
            else:  # the mean needs no directions
                results[i] = singular_values(product).clamp_max(1).mean()
        return results

    def limits(
        self, orders: Tensor, progress: Progress
    ) -> Float64[Tensor, "batch space other"] | None:
        """What the mean with the rows of b permuted does not exceed; none where it is weighted."""
        if self._by_x:
            return None
        ranks = torch.tensor([basis.q.shape[1] for basis in self._bases], dtype=torch.float64)
        least = torch.minimum(ranks, ranks[:, None])
        spans = torch.stack([q @ q.T for q in self._short])
        return nuclear_limits(spans, spans, least, orders, progress) / least

    def resampled(self, a: int, b: int, weights: Tensor) -> Float64[Tensor, " batch"]:
        """The figure of `svcca` or `pwcca` moved along its influence function by weights of rows.

        The directions' weights stay.
        """
        x, y = self._bases[a], self._bases[b]
        left, correlations, right = canonical(x, y)
        u, v, along = x.q @ left, y.q @ right.T, self._weights(a, left)
        influence = (u * v) @ along - (u.square() + v.square()) @ (along * correlations / 2)
        return (along @ correlations + (weights - 1) @ influence).clamp(0, 1)

    def _weights(self, a: int, left: Tensor) -> Float64[Tensor, " k"]:
        if not self._by_x:
            return torch.full((left.shape[1],), 1 / left.shape[1], dtype=torch.float64)
        sizes = (left.T.double() @ self._onto[a]).abs().sum(dim=1)
        return sizes / sizes.sum()


Dissimilarity = Literal["euclidean", "cosine", "correlation"]


def rsa(
    x: Float[Tensor, "row d_in"],
    y: Float[Tensor, "other d_out"],
    dissimilarity: Dissimilarity = "euclidean",
) -> float:
    """Spearman correlation of the upper triangles of both dissimilarity matrices.

    Kriegeskorte et al. 2008. "euclidean" does not see rotations and shifts; "correlation", the
    customary 1 - Pearson between two rows, sees rotations because it centres each row.

    Returns:
        -1..1; nan where all dissimilarities of a side are equal.

    Raises:
        ValueError: If the sides do not have the same rows, or fewer than 3.
    """
    pair = paired(x, y, at_least=3)
    above = torch.triu_indices(len(pair.x), len(pair.x), offset=1).unbind()
    sides = [dissimilarities(rows, dissimilarity)[above] for rows in pair]
    ranks = [torch.from_numpy(stats.rankdata(side.numpy())).double() for side in sides]
    a, b = (rank - rank.mean() for rank in ranks)
    return float(a @ b / (a.norm() * b.norm()))


def dissimilarities(
    x: Float64[Tensor, "row d_in"], dissimilarity: Dissimilarity = "euclidean"
) -> Float64[Tensor, "row row"]:
    """The dissimilarity of every pair of rows; a row of norm 0 has cosine 0 with all others."""
    match dissimilarity:
        case "euclidean":
            return _distances(x)
        case "cosine":
            unit = torch.nn.functional.normalize(x, dim=1, eps=torch.finfo(x.dtype).tiny)
            return 1 - unit @ unit.T
        case "correlation":
            return dissimilarities(x - x.mean(dim=1, keepdim=True), "cosine")
        case _:
            assert_never(dissimilarity)


def _distances(x: Float64[Tensor, "row d_in"]) -> Float64[Tensor, "row row"]:
    """Euclidean, by differences: a product would lose digits of near rows, and break ties."""
    above = torch.triu_indices(len(x), len(x), offset=1).unbind()
    result = torch.zeros(len(x), len(x), dtype=x.dtype)
    result[above] = torch.pdist(x)
    return result + result.T


def procrustes_distance(x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"]) -> float:
    """||A||^2 + ||B||^2 - 2 ||A^T B||_* of the centred sides, each scaled to Frobenius norm 1.

    Ding et al. 2021 (arXiv 2108.01661); its root is a shape metric (Williams et al. 2021, arXiv
    2110.14739). Widths may differ: the narrower side counts as padded with zeros.

    Returns:
        0 for rotated, reflected, shifted or scaled copies, at most 2; nan where a side does not
        vary.

    Raises:
        ValueError: If the sides do not have the same rows.
    """
    a, b = (centred(rows) for rows in paired(x, y))
    a, b = a / a.norm(), b / b.norm()
    if not bool(a.isfinite().all() and b.isfinite().all()):
        return float("nan")
    return float((2 - 2 * torch.linalg.svdvals(a.T @ b).sum()).clamp_min(0))


def rotation_onto(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_in"]
) -> Float64[Tensor, "d_in d_in"]:
    """The orthogonal R for which x @ R is nearest to y (Schoenemann 1966); nothing is centred.

    Raises:
        ValueError: If the sides do not have the same rows.
    """
    pair = paired(x, y)
    u, _, v = torch.linalg.svd(pair.x.T @ pair.y)
    return u @ v


def distance_correlation(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"], *, debiased: bool = True
) -> float:
    """<A, B> / sqrt(<A, A> <B, B>) of the centred Euclidean distances between rows.

    Székely et al. 2007, the squared form; debiased as in Székely and Rizzo 2013, without which
    independent rows of many dimensions come out near 1. It is 0 for independent rows only, so it
    sees what no correlation does, and 1 for a rotated, scaled and shifted copy.

    Returns:
        At most 1; nan where all rows of a side are equal. Debiased it may fall below 0.

    Raises:
        ValueError: If the sides do not have the same rows, or fewer than 4.
    """
    pair = paired(x, y, at_least=4)
    a, b = (doubly_centred(dissimilarities(rows), debiased) for rows in pair)
    norm = float((a * a).sum() * (b * b).sum())
    return float((a * b).sum()) / math.sqrt(norm) if norm > 0 else math.nan


def doubly_centred(
    distance: Float64[Tensor, "row row"], debiased: bool
) -> Float64[Tensor, "row row"]:
    """Rows and columns of mean 0; debiased over the entries beside the diagonal alone."""
    if not debiased:
        means = distance.mean(dim=0)
        return distance - means - means[:, None] + distance.mean()
    n = len(distance)
    sums = distance.sum(dim=0)
    result = distance - (sums + sums[:, None]) / (n - 2) + distance.sum() / ((n - 1) * (n - 2))
    return result.fill_diagonal_(0.0)
