"""What probes read: a matrix of units over rows, sparse for dictionaries."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.evaluate.baselines import random_dictionary

Units: TypeAlias = scipy.sparse.csr_matrix | np.ndarray
"""(row, unit)."""

Arm = Callable[[Float[Tensor, "row d_in"]], Units]
"""From rows to what a probe may read."""

ROWS_AT_ONCE = 4096


class Task(NamedTuple):
    """A binary property of rows, with the rows to fit on and others to score on."""

    train_x: Float[Tensor, "row d_in"]
    train_y: Bool[np.ndarray, " row"]
    test_x: Float[Tensor, "other d_in"]
    test_y: Bool[np.ndarray, " other"]
    test_group: Int[np.ndarray, " other"]
    """What is independent of each other among the rows to score on, such as their examples."""


def check_two_classes(y: Bool[np.ndarray, " row"], what: str) -> None:
    """Refuse labels that say nothing.

    Raises:
        ValueError: If all are the same.
    """
    n_true = int(y.sum())
    if n_true in {0, len(y)}:
        raise ValueError(
            f"{what} must have both classes, got {n_true} positive of {len(y)}; "
            "take another label or more rows"
        )


def codes_of(dictionary: SparseAutoencoder) -> Arm:
    """An arm that reads a dictionary's latents."""

    @torch.no_grad()
    def read(x: Float[Tensor, "row d_in"]) -> Units:
        parts = []
        for part in x.split(ROWS_AT_ONCE):
            latents = dictionary.encode(part.to(dictionary.dec_rows.device))
            fires = latents.values != 0
            row = fires.nonzero()[:, 0].cpu().numpy()
            entries = latents.values[fires].cpu().numpy(), (row, latents.indices[fires].cpu())
            shape = (len(part), dictionary.config.d_sae)
            parts.append(scipy.sparse.csr_matrix(entries, shape=shape))
        return scipy.sparse.csr_matrix(scipy.sparse.vstack(parts))

    return read


def raw(x: Float[Tensor, "row d_in"]) -> Units:
    """The arm that reads the stream's own dimensions."""
    return x.float().cpu().numpy()


def default_arms(
    dictionaries: Mapping[str, SparseAutoencoder],
    l0: Mapping[str, float],
    generator: torch.Generator,
) -> dict[str, Arm]:
    """Each dictionary beside an untrained random one of its size, and the raw stream.

    Args:
        dictionaries: By name.
        l0: Mean number of latents that fire, by the same names: the random one fires as many.
        generator: Draws the random directions.
    """
    arms: dict[str, Arm] = {name: codes_of(of_one) for name, of_one in dictionaries.items()}
    for name, of_one in dictionaries.items():
        arms[f"{name}, random"] = codes_of(random_dictionary(of_one, l0[name], generator))
    return {**arms, "raw neurons": raw}


def mean_difference(units: Units, y: Bool[np.ndarray, " row"]) -> Float64[np.ndarray, " unit"]:
    """Mean of each unit over the positive rows less that over the negative rows."""
    weight = np.where(y, 1 / y.sum(), -1 / (~y).sum())
    return np.asarray(units.T @ weight, dtype=np.float64).ravel()


def columns(units: Units, chosen: Int[np.ndarray, " k"]) -> Float[np.ndarray, "row k"]:
    """Some units as a dense matrix."""
    part = units[:, chosen]
    return part.toarray() if isinstance(part, scipy.sparse.csr_matrix) else np.asarray(part)
