"""From one space to another: relative representations and ASIF, over anchors that both share.

Stitching: how much of one stream an affine map of another gives; scored on rows here, and by what
the rest of a model loses in `substitution`.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from activations_cache.checks import Progress
from monosema.checks import MonosemaError
from sae.architecture import ReLU, SAEConfig, Slice
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.alignment import centred, paired, product_nulls


def relative(
    x: Float[Tensor, "row d_in"], anchors: Float[Tensor, "anchor d_in"]
) -> Float64[Tensor, "row anchor"]:
    """Cosine of every row with every anchor (Moschella et al. 2023, arXiv 2209.15430).

    Rows of two spaces that are rotated copies of each other get the same relative rows, if the
    anchors are the same examples.

    Raises:
        ValueError: If a row or an anchor has norm 0, and so no direction.
    """
    sides = (x.detach().double(), anchors.detach().double())
    for name, rows in zip(("x", "anchors"), sides, strict=True):
        if not bool((rows.norm(dim=1) > 0).all()):
            raise MonosemaError(f"{name} must have no row of norm 0, got one; leave it out")
    unit, unit_anchors = (rows / rows.norm(dim=1, keepdim=True) for rows in sides)
    return unit @ unit_anchors.T


def sparse_relative(
    rows: Float64[Tensor, "row anchor"], k: int, power: float = 1.0
) -> Float64[Tensor, "row anchor"]:
    """Keep the k largest of each relative row, raise them to a power and scale to norm 1.

    Raises:
        ValueError: If k is not in 1..anchors.
    """
    if not 1 <= k <= rows.shape[1]:
        raise MonosemaError(f"k must be in 1..{rows.shape[1]}, the number of anchors, got {k}")
    top = rows.clamp_min(0).topk(k, dim=1)
    largest = torch.zeros_like(rows).scatter_(1, top.indices, top.values**power)
    return torch.nn.functional.normalize(largest, dim=1, eps=torch.finfo(rows.dtype).tiny)


def asif(
    x: Float[Tensor, "row d_in"],
    candidates: Float[Tensor, "candidate d_out"],
    anchors_x: Float[Tensor, "anchor d_in"],
    anchors_y: Float[Tensor, "other d_out"],
    *,
    k: int,
    power: float = 1.0,
) -> Int[Tensor, " row"]:
    """The candidate of the other space for each row, without any training.

    Both sides become sparse relative rows over anchors that are paired, and are compared by cosine
    (Norelli et al. 2023, arXiv 2210.01738).

    Args:
        x: Rows, such as embeddings of images.
        candidates: What they are matched with, such as embeddings of captions.
        anchors_x: Anchors in the space of x.
        anchors_y: The same anchors in the space of the candidates.
        k: Anchors that are kept of each.
        power: What the kept similarities are raised to.

    Raises:
        ValueError: If the anchors are not paired, or k is out of range.
    """
    paired(anchors_x, anchors_y)
    sparse_x = sparse_relative(relative(x, anchors_x), k, power)
    others = sparse_relative(relative(candidates, anchors_y), k, power)
    return (sparse_x @ others.T).argmax(dim=1)


ASIF_SHARE, ASIF_POWER = 0.1, 8.0
"""Share of the anchors that stay in a sparse relative row, and what they are raised to."""
AnchoredKind = Literal["relative", "relative search", "asif"]


class Anchored:
    """Rows by their cosines with anchors: how alike these are, or whether they find the partner.

    "relative" is the mean cosine between the relative rows of both sides; the searches are recall
    at k among all rows that are no anchors. Anchors stay paired; what is exchanged is which of the
    other rows is whose partner. All rows are centred first: a mean that dwarfs the rest makes
    every cosine 1.
    """

    def __init__(
        self,
        rows: Sequence[Float64[Tensor, "row _"]],
        anchors: Bool[Tensor, " row"],
        kind: AnchoredKind,
        k: int,
    ) -> None:
        """Take the sets, which rows are anchors, and k.

        Raises:
            ValueError: If there are no two halves, k is not below the number of rows that are
                searched, or a row is the mean row.
        """
        self._scored, self._kind, self._k = ~anchors, kind, k
        n_anchors, n_scored = _require_halves(kind, anchors), int(self._scored.sum())
        if kind != "relative" and k >= n_scored:
            raise MonosemaError(f"neighbours must be below the {n_scored} rows searched, got {k}")
        self._unit = []
        for x in map(centred, rows):
            cosine = relative(x[self._scored], x[anchors])
            if kind == "asif":
                cosine = sparse_relative(cosine, max(1, round(ASIF_SHARE * n_anchors)), ASIF_POWER)
            self._unit.append(torch.nn.functional.normalize(cosine, dim=1))

    def null(self, a: int, b: int, orders: Tensor) -> Float64[Tensor, " batch"]:
        """The mean over the rows that are no anchors, with other partners."""
        scores = self._scores(a, b)
        rows, scored = torch.arange(len(scores)), self._scored
        return torch.stack([scores[rows, order[scored].argsort()].mean() for order in orders])

    def resampled(self, a: int, b: int, weights: Tensor) -> Float64[Tensor, " batch"]:
        """The mean with weights of rows; anchors and candidates stay."""
        weights = weights[:, self._scored]
        return weights @ self._scores(a, b).diagonal() / weights.sum(dim=1)

    def _scores(self, a: int, b: int) -> Float64[Tensor, "row row"]:
        """Cosines, or 1 where a row of b is among the k nearest to a row of a."""
        scores = self._unit[a] @ self._unit[b].T
        if self._kind == "relative":
            return scores
        near = scores.topk(self._k, dim=1).indices
        return torch.zeros_like(scores).scatter_(1, near, 1.0)


class Stitch(NamedTuple):
    """An affine map from rows of one space to rows of another."""

    weight: Float64[Tensor, "d_in d_out"]
    bias: Float64[Tensor, " d_out"]

    def __call__(self, x: Float[Tensor, "row d_in"]) -> Float64[Tensor, "row d_out"]:
        """Map rows."""
        return x.double() @ self.weight + self.bias

    def dictionary(self, from_place: str, to_place: str) -> SparseAutoencoder:
        """The map as what is spliced into a model: a skip, and one latent that writes nothing."""
        d_in, d_out = self.weight.shape
        result = SparseAutoencoder(
            SAEConfig(
                d_in=d_in, d_out=d_out, d_sae=1, activation=ReLU(), b_in="none", skip=True,
                inputs=(Slice(hook_point=from_place, width=d_in),),
                outputs=(Slice(hook_point=to_place, width=d_out),),
            )
        ).requires_grad_(False)  # fmt: skip
        for parameter in result.parameters():
            parameter.zero_()
        result.skip_rows.copy_(self.weight.T)
        result.b_dec.copy_(self.bias)
        return result


RIDGE = 1e-6
"""Of a stitch, relative to the mean variance of what it is fitted on."""


def fit_stitch(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"], *, ridge: float = RIDGE
) -> Stitch:
    """Least squares with a small ridge (Lenc and Vedaldi 2015; Bansal et al. 2021).

    Raises:
        ValueError: If the sides do not have the same rows.
    """
    pair = paired(x, y)
    mean_x, mean_y = pair.x.mean(dim=0), pair.y.mean(dim=0)
    a, b = pair.x - mean_x, pair.y - mean_y
    weight = torch.linalg.solve(ridged_gram(a, ridge), a.T @ b)
    return Stitch(weight, mean_y - mean_x @ weight)


def ridged_gram(a: Float64[Tensor, "row d_in"], ridge: float) -> Float64[Tensor, "d_in d_in"]:
    """a^T a, and on its diagonal the ridge times its mean diagonal."""
    gram = a.T @ a
    return gram + torch.eye(len(gram), dtype=gram.dtype) * (ridge * gram.diag().mean() + 1e-30)


def _require_halves(measure: str, half: Bool[Tensor, " row"]) -> int:
    """The number of rows in one half, if both have two rows.

    Raises:
        ValueError: If one has fewer.
    """
    n = int(half.sum())
    if min(n, len(half) - n) < 2:
        raise MonosemaError(
            f"{measure} must have two rows in each half of the examples, got {n} of {len(half)}; "
            "take more examples"
        )
    return n


class Stitching:
    """Share of the variance of b that an affine map of a gives on the half it was not fitted on."""

    def __init__(self, rows: list[Float64[Tensor, "row _"]], fitted: Bool[Tensor, " row"]) -> None:
        """Take the sets, and which rows maps are fitted on.

        Raises:
            ValueError: If one half has fewer than two rows.
        """
        self._rows, self._fitted = rows, fitted
        _require_halves("stitching", fitted)

    def resampled(self, a: int, b: int, weights: Tensor) -> Float64[Tensor, " batch"]:
        """R^2 over all columns with weights of rows; the map and the mean stay.

        Below 0 where the mean of b would do better.

        Raises:
            ValueError: If there are no more rows to fit on than columns of a.
        """
        rest, spread = self._squares(a, b)
        weights = weights[:, ~self._fitted]
        return 1 - (weights @ rest) / (weights @ spread)

    def nulls(self, orders: Tensor, progress: Progress) -> Float64[Tensor, "batch space space"]:
        """R^2 of all pairs with the rows of the second permuted and the map fitted again.

        What is left of y is R y, R of the first side alone, so its square is <R^T R, y y^T>.
        """
        left = [
            *map(self._remainder, self._rows),
            self._remainder(torch.zeros(len(self._fitted), 1).double()),
        ]
        left[-1][:, self._fitted] = 0
        left[-1][:, ~self._fitted] -= 1 / len(left[-1])
        right = [centred(y) / centred(y).norm() for y in self._rows]
        squares = torch.stack([(r.T @ r).float() for r in left])
        kernels = torch.stack([(y @ y.T).float() for y in right])
        products = product_nulls(squares, kernels, orders, progress)
        return 1 - products[:, :-1] / products[:, -1:]

    def _remainder(self, x: Float64[Tensor, "row d_in"]) -> Float64[Tensor, "half row"]:
        """What takes y to what a map of x, fitted on one half, leaves of the other."""
        fit, scored = x[self._fitted], x[~self._fitted]
        mean = fit.mean(dim=0)
        a = fit - mean
        result = torch.zeros(len(scored), len(x), dtype=torch.float64)
        taken = (scored - mean) @ torch.linalg.solve(ridged_gram(a, RIDGE), a.T)
        result[:, self._fitted] = -taken - 1 / len(fit)
        result[torch.arange(len(scored)), (~self._fitted).nonzero()[:, 0]] = 1
        return result

    def _squares(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """Of each scored row: what the map leaves of it, and how far it is from the mean."""
        x, y, n_fitted = self._rows[a], self._rows[b], int(self._fitted.sum())
        if n_fitted <= x.shape[1]:
            raise MonosemaError(
                f"stitching must have more rows to fit on than columns ({x.shape[1]}), got "
                f"{n_fitted}; take more rows"
            )
        scored = y[~self._fitted]
        rest = scored - fit_stitch(x[self._fitted], y[self._fitted])(x[~self._fitted])
        return rest.square().sum(dim=1), centred(scored).square().sum(dim=1)
