"""The one-to-one assignment of largest total value, exactly."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor


class Pairs(NamedTuple):
    """Features and latents that are held against each other, one pair a place."""

    features: Int64[Tensor, " pair"]
    """Numbers of features."""
    latents: Int64[Tensor, " pair"]
    """Numbers of latents."""


def assign(values: Float[Tensor, "feature d_sae"]) -> Pairs:
    """Pairs that use each feature and each latent at most once, of the largest sum of values.

    There are min(n_features, d_sae) of them, in the order of the fewer (Crouse 2016, in scipy).
    """
    wide = values.shape[0] <= values.shape[1]
    rows, columns = linear_sum_assignment(
        (values if wide else values.T).double().cpu().numpy(), maximize=True
    )
    fewer = torch.as_tensor(rows, device=values.device)
    more = torch.as_tensor(columns, device=values.device)
    return Pairs(fewer, more) if wide else Pairs(more, fewer)
