"""Stitching: whether what reads one stream can go on with another, through a linear map."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sae.evaluate.representation.paired import paired


class Stitch(NamedTuple):
    """An affine map from rows of one space to rows of another."""

    weight: Float64[Tensor, "d_in d_out"]
    bias: Float64[Tensor, " d_out"]

    def __call__(self, x: Float[Tensor, "row d_in"]) -> Float64[Tensor, "row d_out"]:
        """Map rows."""
        return x.double() @ self.weight + self.bias


class Stitched(NamedTuple):
    """What reading stitched rows costs."""

    loss: float
    """With the rows that the reader was made for."""
    loss_stitched: float
    """With the other rows, mapped."""
    loss_mean: float
    """With the mean row: what a map that carries nothing gives."""


def fit_stitch(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "other d_out"], *, ridge: float = 1e-6
) -> Stitch:
    """Least squares with a small ridge, relative to the mean variance of x.

    Raises:
        ValueError: If the sides do not have the same rows.
    """
    pair = paired(x, y)
    mean_x, mean_y = pair.x.mean(dim=0), pair.y.mean(dim=0)
    a, b = pair.x - mean_x, pair.y - mean_y
    gram = a.T @ a
    gram = gram + torch.eye(len(gram), dtype=gram.dtype) * (ridge * gram.diag().mean() + 1e-30)
    weight = torch.linalg.solve(gram, a.T @ b)
    return Stitch(weight, mean_y - mean_x @ weight)


def stitching_loss(
    reader: Callable[[Tensor], float],
    stitch: Stitch,
    x: Float[Tensor, "row d_in"],
    y: Float[Tensor, "other d_out"],
) -> Stitched:
    """The loss of a reader of y with y, with stitched x and with the mean of y.

    Lenc and Vedaldi 2015; Bansal et al. 2021 (arXiv 2106.07682).

    Args:
        reader: From rows of y's space to a loss, such as the rest of a model.
        stitch: Fitted on other rows than these.
        x: Rows of the other space.
        y: Rows of the same examples in the reader's space.

    Raises:
        ValueError: If the sides do not have the same rows.
    """
    pair = paired(x, y)
    mean = pair.y.mean(dim=0).expand_as(pair.y)
    return Stitched(reader(pair.y), reader(stitch(pair.x)), reader(mean))
