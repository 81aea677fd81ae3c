"""Which classes or attributes of images a latent prefers: enrichment with p-values."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy import stats


class Enrichment(NamedTuple):
    """Classes against latents."""

    lift: Float64[np.ndarray, "d_sae word"]
    """Share of the class among firing images / its share among all."""
    p_value: Float64[np.ndarray, "d_sae word"]
    """One-sided Fisher, times the number of classes."""
    best: Int64[np.ndarray, " d_sae"]
    """The class of the smallest p-value, the larger lift among equals; -1 where the latent fires on
    too few images."""


def class_enrichment(
    fires: Bool[np.ndarray, "example d_sae"],
    has: Bool[np.ndarray, "row word"],
    *,
    least: int = 5,
) -> Enrichment:
    """Test every class, or attribute, against every latent by the hypergeometric distribution.

    Args:
        fires: Whether each latent fires in each image.
        has: Whether each image has each class or attribute, such as the folder it lies in.
        least: A latent that fires on fewer images is not labelled.

    Raises:
        ValueError: If there is only one class, or the images differ in number.
    """
    if has.shape[1] < 2:
        raise ValueError(f"classes must be at least two to be told apart, got {has.shape[1]}")
    if len(fires) != len(has):
        raise ValueError(f"fires must be of {len(has)} images, got {len(fires)}")
    n, n_fired, n_has = len(has), fires.sum(axis=0), has.sum(axis=0)
    both = fires.T.astype(np.int64) @ has.astype(np.int64)
    p = stats.hypergeom.sf(both - 1, n, n_has[None, :], n_fired[:, None])
    expected = n_fired[:, None] * n_has[None, :] / n
    lift = both / np.maximum(expected, 1e-12)
    order = np.lexsort((-lift, p), axis=1)
    best = np.where(n_fired >= least, order[:, 0], -1)
    return Enrichment(lift, np.minimum(p * has.shape[1], 1.0), best.astype(np.int64))
