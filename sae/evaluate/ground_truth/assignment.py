"""The one-to-one assignment of largest total value, exactly (numpy alone)."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor


class Pairs(NamedTuple):
    """Features and latents that are held against each other, one pair a place."""

    features: Int64[Tensor, " pair"]
    """Numbers of features."""
    latents: Int64[Tensor, " pair"]
    """Numbers of latents."""


def assign(values: Float[Tensor, "feature d_sae"]) -> Pairs:
    """Pairs that use each feature and each latent at most once, of the largest sum of values.

    There are min(n_features, d_sae) of them, in the order of the fewer. Shortest augmenting paths
    (Jonker and Volgenant 1987; Crouse 2016): O(n^2 m) for n <= m, a vector operation of length m
    per step; ties fall to the lower number.
    """
    wide = values.shape[0] <= values.shape[1]
    cost = -(values if wide else values.T).double().cpu().numpy()
    columns = torch.as_tensor(_columns_of_rows(cost), device=values.device)
    rows = torch.arange(len(columns), device=values.device)
    return Pairs(rows, columns) if wide else Pairs(columns, rows)


def _columns_of_rows(cost: Float64[np.ndarray, "n m"]) -> Int64[np.ndarray, " n"]:
    """The column of each row in the cheapest assignment of all rows; n_rows <= n_columns."""
    n, m = cost.shape
    row_price, column_price = np.zeros(n), np.zeros(m)
    column_of, row_of = np.full(n, -1), np.full(m, -1)
    for start in range(n):
        shortest, through = np.full(m, np.inf), np.full(m, -1)
        done_rows, done = [], np.zeros(m, dtype=bool)
        row, so_far, sink = start, 0.0, -1
        while sink < 0:
            done_rows.append(row)
            reach = so_far + cost[row] - row_price[row] - column_price
            closer = (reach < shortest) & ~done
            shortest[closer], through[closer] = reach[closer], row
            column = int(np.where(done, np.inf, shortest).argmin())
            so_far = shortest[column]
            done[column] = True
            if row_of[column] < 0:
                sink = column
            row = row_of[column]
        row_price[start] += so_far
        passed = np.array(done_rows[1:], dtype=int)
        row_price[passed] += so_far - shortest[column_of[passed]]
        column_price[done] -= so_far - shortest[done]
        while True:  # hand the columns of the path on, from its end to its start
            row = through[sink]
            row_of[sink] = row
            column_of[row], sink = sink, column_of[row]
            if row == start:
                break
    return column_of
