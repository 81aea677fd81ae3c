"""The shape of one set of rows: effective rank, heavy tails, and the gap between two sets.

Which concepts the principal directions of rows tell, and which directions an answer needs.

Intrinsic dimension of a set of rows from the distances to the two nearest neighbours.

ZEBRA: which features of a sample are rare, so that an outlier is explained by them.

IIS: how much of a representation's accuracy survives when only a few concepts may be used.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from monosema.checks import MonosemaError
from sae.evaluate.alignment import centred

EPS = 1e-7
"""Added to each share of RankMe, as its paper does."""


class Outliers(NamedTuple):
    """Dimensions that are larger than the others."""

    dimensions: Int64[Tensor, " outlier"]
    """Their numbers, the largest first."""
    ratio: Float64[Tensor, " outlier"]
    """Root mean square over that of the median dimension."""


def rankme(x: Float[Tensor, "row d_in"]) -> float:
    """exp(-sum p log p), p_k = sigma_k / sum sigma + 1e-7, of the rows as they are.

    Garrido et al. 2023 (arXiv 2210.02885): k equal singular values give k. Centre the rows first to
    leave a mean that dwarfs the rest out of it.

    Raises:
        ValueError: If all rows are 0 or there are none.
    """
    sizes = torch.linalg.svdvals(x.detach().double())
    if sizes.numel() == 0 or float(sizes[0]) == 0:
        raise MonosemaError(f"x must have a row other than 0, got {len(x)} rows of 0")
    p = sizes / sizes.sum() + EPS
    return float((-(p * p.log()).sum()).exp())


def kurtosis(x: Float[Tensor, "row d_in"]) -> Float64[Tensor, " d_in"]:
    """E z^4 / (E z^2)^2 of each centred dimension: 3 for a Gaussian; nan where it does not vary."""
    z = centred(x.detach().double())
    return z.pow(4).mean(dim=0) / z.square().mean(dim=0).square()


def outlier_dimensions(x: Float[Tensor, "row d_in"], ratio: float = 6.0) -> Outliers:
    """Dimensions whose root mean square is above `ratio` times that of the median dimension.

    A privileged basis shows by them and by their kurtosis; a random rotation removes both
    (Crabbé et al. 2024).

    Raises:
        ValueError: If ratio is not above 1 or more than half of the dimensions are 0.
    """
    if ratio <= 1:
        raise MonosemaError(f"ratio must be above 1, got {ratio}")
    sizes = x.detach().double().square().mean(dim=0).sqrt()
    median = sizes.median()
    if float(median) == 0:
        raise MonosemaError("x must not be 0 in half of its dimensions, got such rows")
    order = (sizes / median).sort(descending=True)
    n_large = int((order.values > ratio).sum())
    return Outliers(order.indices[:n_large], order.values[:n_large])


class EncodedConcepts(NamedTuple):
    """How well each principal direction of rows ranks the rows that have a concept."""

    precision: Float64[Tensor, "direction concept"]
    """Average precision, of the better sign; nan where no row has the concept."""

    def unique(self, least: float = 0.9) -> int:
        """The number of concepts that are the best one of a direction with such a precision."""
        best, concept = self.precision.nan_to_num(0).max(dim=1)
        return len(concept[best >= least].unique())

    def per_direction(self, least: float = 0.9) -> float:
        """Concepts with such a precision, mean over the directions that have one; nan without."""
        counts = (self.precision >= least).sum(dim=1).double()
        return float(counts[counts > 0].mean())


def encoded_concepts(
    x: Float[Tensor, "row d_in"], has: Bool[Tensor, "other concept"]
) -> EncodedConcepts:
    """Concepts by direction, the signature of Crabbé et al. (arXiv 2310.13040).

    Their directions are those of a linear head's weights; these are of the rows alone, so that any
    hook point has them.

    Args:
        x: Rows, such as the mean rows of images.
        has: Which concepts each row has.

    Raises:
        ValueError: If both are not of the same rows.
    """
    if len(x) != len(has) or len(x) == 0:
        raise MonosemaError(f"has must have a row for each of the {len(x)} rows, got {len(has)}")
    along = centred(x.detach().double()) @ _directions(x)
    rank, results = torch.arange(1, len(x) + 1, dtype=torch.float64)[:, None], []
    for column in along.unbind(dim=1):
        signs = []
        for order in (column.argsort(descending=True), column.argsort()):
            hits = has[order].double()
            signs.append((hits * hits.cumsum(dim=0) / rank).sum(dim=0) / hits.sum(dim=0))
        results.append(torch.stack(signs).amax(dim=0))
    return EncodedConcepts(torch.stack(results))


def _directions(x: Float[Tensor, "row d_in"]) -> Float64[Tensor, "d_in direction"]:
    """Principal directions along which rows vary, that of the largest variance first."""
    _, sizes, v = torch.linalg.svd(centred(x.detach().double()), full_matrices=False)
    return v[sizes > 1e-10 * sizes[0]].T


class Pruned(NamedTuple):
    """Accuracy on other rows with some of the principal directions taken out."""

    smallest: float
    """Those of the smallest variance."""
    largest: float
    """As many of the largest variance."""


def pruned(
    x: Float[Tensor, "row d_in"],
    labels: Int[Tensor, " row"],
    other: Float[Tensor, "other d_in"],
    other_labels: Int[Tensor, " other"],
    shares: Sequence[float] = (0.0, 0.5, 0.8, 0.9, 0.95),
) -> dict[float, Pruned]:
    """How few directions an answer needs (after Crabbé et al., who prune a trained head).

    A logistic regression is fitted anew on what is left of the rows at each share. Where the
    smallest can go and the largest cannot, a few privileged directions carry the answer.

    Args:
        x: Rows to fit on; the directions are theirs.
        labels: Their classes.
        other: Rows to score on.
        other_labels: Their classes.
        shares: Of the directions that are taken out; at least one stays.

    Raises:
        ValueError: If there is one class, or a share is not in 0..1.
    """
    if len(labels.unique()) < 2:
        raise MonosemaError(f"labels must be of two classes, got {len(labels.unique())}")
    directions = _directions(x)
    mean, n = x.detach().double().mean(dim=0), directions.shape[1]
    sides = [((rows.detach().double() - mean) @ directions) for rows in (x, other)]
    scale = sides[0].square().mean().sqrt()

    def accuracy(part: slice) -> float:
        fitted, scored = ((side[:, part] / scale).numpy() for side in sides)
        head = LogisticRegression(max_iter=1000).fit(fitted, labels.numpy())
        return float(head.score(scored, other_labels.numpy()))

    results = {}
    for share in shares:
        if not 0 <= share <= 1:
            raise MonosemaError(f"shares must be in 0..1, got {share}")
        left = max(1, round(n * (1 - share)))
        results[share] = Pruned(accuracy(slice(left)), accuracy(slice(n - left, n)))
    return results


def modality_gap(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"], *, unit: bool = True
) -> float:
    """||mean(x) - mean(y)||, of rows scaled to norm 1 unless `unit` is false.

    Liang et al. 2022 (arXiv 2203.02053).

    Raises:
        ValueError: If the widths differ or a side has no row.
    """
    if x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise MonosemaError(
            f"x and y must have rows of one width, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    sides = [rows.detach().double() for rows in (x, y)]
    if unit:
        sides = [torch.nn.functional.normalize(rows, dim=1) for rows in sides]
    return float((sides[0].mean(dim=0) - sides[1].mean(dim=0)).norm())


CELLS_AT_ONCE = 1 << 22
"""float64 numbers that are held at once."""

N_CANDIDATES = 4
"""Rows whose distances are taken from differences, for each row."""


class IntrinsicDimension(NamedTuple):
    """A TwoNN estimate."""

    dimension: float
    """The slope."""
    n_rows: int
    """Rows that it rests on."""
    n_duplicates: int
    """Rows that were left out because their nearest neighbour is the same row."""


def two_nn(x: Float[Tensor, "row d_in"], *, discard: float = 0.1) -> IntrinsicDimension:
    """Slope of -log(1 - F(mu)) on log mu through the origin, mu = r2 / r1 (Facco et al. 2017).

    Distances come from differences in float64: those from matrix products lose the small ones,
    which decide here. Memory grows with the rows, not with their square. The known bias is
    downwards: 8.8 for a uniform cube of 10 dimensions.

    Args:
        x: Rows.
        discard: Share of the largest mu, which are noisy, that is left out.

    Raises:
        ValueError: If `discard` is not in 0..1 or fewer than 10 rows differ from their neighbours.
    """
    if not 0 <= discard < 1:
        raise MonosemaError(f"discard must be at least 0 and below 1, got {discard}")
    nearest = nearest_distances(x.detach().double())
    distinct = nearest[:, 0] > 0
    n = int(distinct.sum())
    if n < 10:
        raise MonosemaError(f"x must have at least 10 rows that differ, got {n}; take more rows")
    mu = (nearest[distinct, 1] / nearest[distinct, 0]).sort().values
    tail = -torch.log1p(-torch.arange(1, n + 1, dtype=torch.float64) / (n + 1))
    n_used = max(2, int(n * (1 - discard)))
    log_mu, tail = mu[:n_used].log(), tail[:n_used]
    slope = (log_mu @ tail) / (log_mu @ log_mu)
    return IntrinsicDimension(float(slope), n, len(x) - n)


def nearest_distances(x: Float64[Tensor, "row d_in"]) -> Float64[Tensor, "row 2"]:
    """Distances of each row to the two nearest others, from differences.

    A matrix product says which rows come into question. Where its rounding leaves open whether one
    more does, the row is compared with all others.

    Raises:
        ValueError: If there are fewer than 3 rows.
    """
    n, d_in = x.shape
    if n < 3:
        raise MonosemaError(f"x must have at least 3 rows, got {n}")
    x = centred(x)
    squares = x.square().sum(dim=1)
    largest = squares.max()
    n_candidates = min(N_CANDIDATES, n - 1)
    step = max(1, CELLS_AT_ONCE // max(n, n_candidates * d_in))
    results = []
    for start in range(0, n, step):
        rows = torch.arange(start, min(start + step, n))
        estimate = torch.addmm(squares[None], x[rows], x.T, alpha=-2)
        estimate[torch.arange(len(rows)), rows] = torch.inf
        near = estimate.topk(n_candidates, dim=1, largest=False)
        exact = torch.cdist(
            x[rows, None], x[near.indices], compute_mode="donot_use_mm_for_euclid_dist"
        )[:, 0].square()
        two = exact.topk(2, dim=1, largest=False).values
        rounding = 4 * d_in * torch.finfo(x.dtype).eps * (squares[rows] + largest)
        farthest = near.values[:, -1] + squares[rows]
        is_open = (two[:, 1] > 0) & (farthest - rounding < two[:, 1]) & (n_candidates < n - 1)
        for i in is_open.nonzero().flatten().tolist():
            others = (x - x[rows[i]]).square().sum(dim=1)
            others[rows[i]] = torch.inf
            two[i] = others.topk(2, largest=False).values
        results.append(two.sqrt())
    return torch.cat(results)


class RowsShape(NamedTuple):
    """The shape of one set of rows in a few figures."""

    width: int
    rankme: float
    """Effective rank of the rows as they are."""
    dimension: float
    """TwoNN's intrinsic dimension; nan where too few rows differ."""
    kurtosis: float
    """Median over the columns; 3 for a Gaussian."""
    outliers: int | None
    """Columns of 6 times the root mean square of the median one; None where that is 0."""


def shape_of(x: Float[Tensor, "row d_in"]) -> RowsShape:
    """Effective rank, intrinsic dimension, heavy tails and outliers of rows."""
    try:
        dimension = two_nn(x).dimension
    except MonosemaError:
        dimension = math.nan
    try:
        n_outliers = len(outlier_dimensions(x).dimensions)
    except MonosemaError:
        n_outliers = None
    return RowsShape(x.shape[1], rankme(x), dimension, float(kurtosis(x).nanmedian()), n_outliers)


class Rarity(NamedTuple):
    """How rare the features of samples are among reference rows."""

    p: Float64[Tensor, "row d_sae"]
    """Tail probability of each activation: uniform for a sample like the reference rows."""
    score: Float64[Tensor, " row"]
    """Weighted mean of -log p over the features: 1 on average for such a sample."""

    def explanation(self, sample: int, k: int) -> Tensor:
        """Numbers of the k rarest features of a sample, the rarest first."""
        return self.p[sample].argsort()[:k]


def rarity(
    reference: Float[Tensor, "other _"],
    samples: Float[Tensor, "row d_sae"],
    generator: torch.Generator,
    weights: Float[Tensor, " d_sae"] | None = None,
) -> Rarity:
    """Share of the reference rows at or above each activation, ties broken at random.

    p = (n_above + u (n_equal + 1)) / (n + 1), u uniform, which is uniform itself where the sample
    comes from the reference; without the ties' part the zeros of a sparse feature would not be.

    Args:
        reference: Activations that are ordinary.
        samples: Activations of what is to be explained.
        generator: Breaks the ties.
        weights: How much each feature counts in the score; all the same without.

    Raises:
        ValueError: If widths differ, there is no reference row, or the weights sum to 0.
    """
    if len(reference) == 0 or reference.shape[1] != samples.shape[1]:
        raise MonosemaError(
            "reference must have rows as wide as the samples, got "
            f"{tuple(reference.shape)} and {tuple(samples.shape)}"
        )
    n = len(reference)
    columns = reference.detach().double().sort(dim=0).values.T.contiguous()
    wanted = samples.detach().double().T.contiguous()
    below = torch.searchsorted(columns, wanted).T
    up_to = torch.searchsorted(columns, wanted, right=True).T
    u = torch.rand(below.shape, generator=generator, dtype=torch.float64)
    p = ((n - up_to) + u * (up_to - below + 1)) / (n + 1)
    share = torch.ones(p.shape[1]) if weights is None else weights.detach()
    if not float(share.sum()) > 0 or bool((share < 0).any()):
        raise MonosemaError(
            f"weights must be at least 0 and not all 0, got sum {float(share.sum())}"
        )
    share = share.double() / share.double().sum()
    return Rarity(p, -p.clamp_min(torch.finfo(p.dtype).tiny).log() @ share)


def inherent_interpretability(
    sparsity: Sequence[float], accuracy: Sequence[float], reference: float
) -> float:
    """Integral of accuracy(s) / reference over the sparsity s, by trapezoids.

    A constant ratio r over [a, b] gives r (b - a). Divide by b - a to compare unlike ranges.

    Args:
        sparsity: Shares of concepts that heads may not use, ascending.
        accuracy: Of the head at each sparsity.
        reference: Accuracy of the dense head.

    Raises:
        ValueError: If there are fewer than two points, they do not ascend, or reference is not
            above 0.
    """
    if len(sparsity) != len(accuracy) or len(sparsity) < 2:
        raise MonosemaError(
            "sparsity and accuracy must have at least two points each, got "
            f"{len(sparsity)} and {len(accuracy)}"
        )
    if any(a >= b for a, b in itertools.pairwise(sparsity)):
        raise MonosemaError(f"sparsity must ascend, got {list(sparsity)}")
    if reference <= 0:
        raise MonosemaError(f"reference must be above 0, got {reference}")
    points = list(zip(sparsity, accuracy, strict=True))
    return sum((b - a) * (p + q) / 2 for (a, p), (b, q) in itertools.pairwise(points)) / reference
