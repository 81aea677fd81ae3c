"""Every pair of several sets of rows by every measure of similarity, with its null and interval.

The measures are those of `similarity` and `alignment`; here they share what each set of rows needs
once, so that thirty layers can be held against each other. The null exchanges rows of one side. The
interval is a bootstrap over examples to first order: drawn are weights of rows, and what a measure
centres, ranks, rotates or maps by stays as it is for all rows. `check_measure` asks whether a
measure sees what it should in these rows.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from scipy import stats
from torch import Tensor

from activations_cache.checks import Progress, silent
from monosema.checks import MonosemaError
from sae.evaluate.alignment import Matching, Products, Rotation, centred
from sae.evaluate.similarity import (
    Canonical,
    Neighbourhoods,
    basis_of,
    dissimilarities,
    doubly_centred,
)
from sae.evaluate.translation import Anchored, Stitching
from sae.statistics import each_on_a_core

MeasureName = Literal[
    "cka", "cknna", "rsa", "distance correlation", "svcca", "pwcca", "procrustes", "matching",
    "stitching", "relative", "relative search", "asif",
]  # fmt: skip
PRODUCTS: tuple[MeasureName, ...] = ("cka", "rsa", "distance correlation")
"""Cosines of one (row, row) matrix of each side: the permutations of all pairs cost one product."""
COSTLY: tuple[MeasureName, ...] = ("svcca", "pwcca", "procrustes", "matching")
"""A decomposition or an assignment for each pair and permutation."""
MEASURES: tuple[MeasureName, ...] = get_args(MeasureName)
DIRECTED: tuple[MeasureName, ...] = ("stitching",)
"""From a to b is something else than from b to a, and both are worth to know."""
COSTLY_PERMUTATIONS = 19
"""Of the costly measures at most: as many as a p of 0.05 takes."""
CHANCE_PERMUTATIONS = 5
"""Of a costly measure whose value no permutation reaches: they tell what chance gives."""
BOUND_BYTES = 4 << 30
"""What the matrices of all rows take at most, from which it is told that none reaches it."""
NEAR = 1e-5
"""A permutation this near to the value reaches it: some are computed in float32."""


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """One measure of one pair; larger is more alike."""

    value: float
    low: float
    """Ends of the 95 % interval."""
    high: float
    chance: float
    """Mean over the permutations that were computed."""
    chance_high: float
    """95 % quantile over them."""
    p: float
    """Share of the permutations, the identity among them, that reach the value."""
    n_permutations: int


class Draws(NamedTuple):
    """What is drawn once for all pairs and measures."""

    orders: Int[Tensor, "batch row"]
    """Permutations of the rows."""
    weights: Float64[Tensor, "batch_ row"]
    """How often each row is drawn, for each resample of the examples."""
    fitted: Bool[Tensor, " row"]
    """Rows of one half of the examples: maps are fitted on them, and they are the anchors."""

    @classmethod
    def of(
        cls, example: Int[Tensor, " row"], n_permutations: int, n_draws: int, seed: int
    ) -> "Draws":
        """Draw permutations of rows, and resamples and a half of the examples that they are of.

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
        half = torch.zeros(n, dtype=torch.bool)
        half[torch.randperm(n, generator=generator)[: n // 2]] = True
        return cls(torch.stack(orders), counts[:, number], half[number])


Prepared = Products | Neighbourhoods | Canonical | Rotation | Matching | Stitching | Anchored


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
        k: Neighbours of cknna, and candidates among which a search must have the partner.
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
    try:
        prepared = _prepared(rows, measure, draws.fitted, k, progress)
    except MonosemaError as error:
        return {}, [str(error)] * len(pairs)
    is_small = 3 * 4 * len(rows) * n_rows**2 <= BOUND_BYTES
    chance = _Exchanged(prepared, draws.orders, measure in COSTLY, is_small, progress)
    weights = torch.cat([torch.ones(1, n_rows, dtype=torch.float64), draws.weights])

    def of(pair: tuple[int, int]) -> Similarity | str:
        try:
            figures = _figures(prepared, *pair, weights)
        except MonosemaError as error:
            return str(error)
        value = float(figures[0])
        return _judged(value, *chance.of(*pair, value), figures[1:])

    results, problems = {}, []
    for done, (pair, result) in enumerate(zip(pairs, each_on_a_core(of, pairs), strict=True), 1):
        if isinstance(result, str):
            problems.append(result)
        else:
            results[pair] = result
            progress(done, len(pairs), f"pairs by {measure}")
    return results, problems


def _figures(
    prepared: Prepared, a: int, b: int, weights: Float64[Tensor, "batch row"]
) -> Float64[Tensor, " batch"]:
    """A measure with weights of rows, of which the first are 1."""
    result = prepared.resampled(a, b, weights)
    if isinstance(prepared, Products):
        result[0] = prepared.value(a, b)  # the others are products of float32
    return result


class _Exchanged:
    """What a measure gives with the rows of one side permuted."""

    def __init__(
        self,
        prepared: Prepared,
        orders: Int[Tensor, "batch row"],
        is_costly: bool,
        is_small: bool,
        progress: Progress,
    ) -> None:
        self._prepared, self._orders = prepared, orders
        self._few = orders[:COSTLY_PERMUTATIONS] if is_costly else orders
        self._all = self._limits = None
        if isinstance(prepared, Products | Stitching):
            self._all = prepared.nulls(orders, progress)
        elif isinstance(prepared, Canonical | Rotation) and is_small:
            self._limits = prepared.limits(orders, progress)

    def of(self, a: int, b: int, value: float) -> tuple[Float64[Tensor, " batch"], int]:
        """The figures, and how many permutations were looked at.

        If bounds say that none reaches the value, that is all of them, and few are computed: p is
        then the least one, as it would be with the figures.
        """
        if self._all is not None:
            return self._all[:, a, b].double(), len(self._orders)
        assert not isinstance(self._prepared, Products | Stitching)
        if self._limits is not None and bool((self._limits[:, a, b] < value - NEAR).all()):
            few = self._few[:CHANCE_PERMUTATIONS]
            return self._prepared.null(a, b, few).double(), len(self._orders)
        return self._prepared.null(a, b, self._few).double(), len(self._few)


def _judged(value: float, null: Tensor, n_permutations: int, resampled: Tensor) -> Similarity:
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    known = resampled[resampled.isfinite()]
    low, high = torch.quantile(known, ends).tolist() if len(known) else (math.nan, math.nan)
    reached = 1 + int((null >= value - NEAR).sum())
    return Similarity(
        value=value, low=min(low, value), high=max(high, value), chance=float(null.mean()),
        chance_high=float(null.quantile(0.95)), p=reached / (1 + n_permutations),
        n_permutations=n_permutations,
    )  # fmt: skip


def _matrices(
    rows: list[Float64[Tensor, "row _"]], measure: MeasureName, progress: Progress
) -> Float32[Tensor, "space row row"]:
    """One matrix of norm 1 for each set, whose cosine with another's is the measure."""

    def of(x: Tensor) -> Tensor:
        if measure == "cka":
            kernel = centred(x) @ centred(x).T
            matrix = doubly_centred(kernel.fill_diagonal_(0), debiased=True)
        elif measure == "rsa":
            matrix = _ranks(dissimilarities(x))
        else:
            matrix = doubly_centred(dissimilarities(x), debiased=True)
        return (matrix / matrix.norm()).float()

    results = torch.empty(len(rows), len(rows[0]), len(rows[0]))
    for i, matrix in enumerate(each_on_a_core(of, rows)):
        results[i] = matrix
        progress(i + 1, len(rows), f"sets of rows for {measure}")
    return results


def _ranks(distances: Float64[Tensor, "row row"]) -> Float64[Tensor, "row row"]:
    above = torch.triu_indices(len(distances), len(distances), offset=1).unbind()
    ranks = torch.from_numpy(stats.rankdata(distances[above].numpy()))
    result = torch.zeros_like(distances)
    result[above] = ranks - ranks.mean()
    return result + result.T


def _prepared(
    rows: list[Float64[Tensor, "row _"]],
    measure: MeasureName,
    fitted: Bool[Tensor, " row"],
    k: int,
    progress: Progress = silent,
) -> Prepared:
    if measure in PRODUCTS:
        return Products(_matrices(rows, measure, progress))
    if measure == "cknna":
        return Neighbourhoods(rows, k)
    if measure == "svcca":
        return Canonical(list(each_on_a_core(partial(basis_of, variance=0.99), rows)), by_x=False)
    if measure == "pwcca":
        return Canonical(list(each_on_a_core(partial(basis_of, variance=1.0), rows)), by_x=True)
    if measure == "procrustes":
        return Rotation([centred(x) / centred(x).norm() for x in rows])
    if measure == "stitching":
        return Stitching(rows, fitted)
    if measure in ("relative", "relative search", "asif"):
        return Anchored(rows, fitted, measure, k)
    return Matching([torch.nn.functional.normalize(centred(x), dim=0) for x in rows])


SHARES = (0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
"""Of a set's principal components, the smallest first, that are taken out of it."""
CHECKED_SETS = 8
"""Sets at most, evenly spread, of which components are taken out."""


class MeasureCheck(NamedTuple):
    """Whether a measure sees what it should (after Ding et al. 2021, arXiv 2108.01661)."""

    removable: float
    """Share of the components that may go before a set is less like itself than like the set
    nearest to it, mean over sets: near 1 the measure sees the largest components alone."""
    without_first: float
    """A set against itself without its largest component, mean over sets."""
    order: float
    """Spearman's correlation of the measure with nearness of layers; nan below three depths."""
    p: float
    """Share of the exchanges of depths, the identity among them, that reach it."""
    same_layer: float
    """Share of the layers whose most alike one in another cache is that of the same depth; nan
    with one cache."""


def check_measure(
    spaces: Mapping[str, Float[Tensor, "row _"]],
    values: Float64[Tensor, "space other"],
    places: Sequence[tuple[int, int]],
    measure: MeasureName,
    draws: Draws,
    *,
    k: int = 10,
) -> MeasureCheck:
    """Sensitivity to removed principal components, and specificity to layers, of one measure.

    The paper's threshold is the distance between seeds of a model; here it is the nearest other set
    of those at hand.

    Args:
        spaces: Rows of the same examples, by name.
        values: The measure of all pairs, nan where there is none.
        places: Number of the cache, and depth in it, of each set.
        measure: Which measure.
        draws: As `compare` takes them; as many exchanges of depths as there are permutations.
        k: As `compare` takes it.
    """
    others = values.where(values.isfinite(), -math.inf).fill_diagonal_(-math.inf)
    nearest = others.amax(dim=1)
    step = max(1, math.ceil(len(spaces) / CHECKED_SETS))
    removable, without_first = [], []
    for (_, x), limit in list(zip(spaces.items(), nearest.tolist(), strict=True))[::step]:
        first, *rest = _alike_to_itself(x.detach().double(), measure, draws.fitted, k)
        without_first.append(first)
        stays = [value > limit - 1e-6 for value in rest]  # float32 in some
        n_stay = stays.index(False) if False in stays else len(stays)
        is_known = all(map(math.isfinite, (limit, *rest)))
        removable.append((0.0, *SHARES)[n_stay] if is_known else math.nan)
    group, depth = (torch.tensor(each) for each in zip(*places, strict=True))
    order, p = _layer_order(values, depth, len(draws.orders))
    return MeasureCheck(_mean(removable), _mean(without_first), order, p,
                        _same_layer(values, group, depth))  # fmt: skip


def _alike_to_itself(
    x: Float64[Tensor, "row d_in"], measure: MeasureName, fitted: Bool[Tensor, " row"], k: int
) -> list[float]:
    """Without the largest component, then without SHARES of the smallest ones."""
    u, sizes, v = torch.linalg.svd(centred(x), full_matrices=False)
    rank = int((sizes > 1e-10 * sizes[0]).sum())
    left = [slice(1, rank), *(slice(max(1, round(rank * (1 - share)))) for share in SHARES)]
    copies = [(u[:, part] * sizes[part]) @ v[part] for part in left]
    results = []
    for copy in copies:
        try:
            prepared = _prepared([copy, x], measure, fitted, k)
            results.append(float(_figures(prepared, 0, 1, torch.ones(1, len(x)).double())[0]))
        except MonosemaError:
            results.append(math.nan)
    return results


def _layer_order(
    values: Float64[Tensor, "space other"], depth: Int[Tensor, " space"], n_exchanges: int
) -> tuple[float, float]:
    """Spearman's correlation with -|difference of depths|, and Mantel's test of it."""
    both = (values + values.T) / 2
    known = torch.triu(both.isfinite(), diagonal=1)
    if len(depth.unique()) < 3 or int(known.sum()) < 3:
        return math.nan, math.nan
    ranks = torch.from_numpy(stats.rankdata(both[known].numpy()))
    generator = torch.Generator().manual_seed(0)
    exchanged = [torch.randperm(len(depth), generator=generator) for _ in range(n_exchanges)]
    results = []
    for order in [torch.arange(len(depth)), *exchanged]:
        near = -(depth[order][:, None] - depth[order]).abs()[known]
        pair = torch.stack([ranks, torch.from_numpy(stats.rankdata(near.numpy()))])
        results.append(float(torch.corrcoef(pair)[0, 1]))
    reached = sum(value >= results[0] - 1e-12 for value in results)
    return results[0], reached / len(results)


def _same_layer(
    values: Float64[Tensor, "space other"],
    group: Int[Tensor, " space"],
    depth: Int[Tensor, " space"],
) -> float:
    """Over every layer and every other cache that has that depth."""
    hits = []
    for i in range(len(depth)):
        for other in set(group.tolist()) - {int(group[i])}:
            there = (group == other).nonzero().flatten()
            row = values[i, there]
            has_partner = len(there) > 1 and bool((depth[there] == depth[i]).any())
            if has_partner and bool(row.isfinite().all()):
                hits.append(float(depth[there[row.argmax()]] == depth[i]))
    return _mean(hits)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
