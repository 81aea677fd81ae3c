"""A picture of directions in two dimensions: PCA always, UMAP where it is installed."""

from importlib.util import find_spec
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor


def plane(
    dec_rows: Float[Tensor, "d_sae d_out"],
    method: Literal["pca", "umap"] = "pca",
    *,
    n_neighbours: int = 15,
    seed: int = 0,
) -> Float[Tensor, "d_sae 2"]:
    """Two coordinates for every latent, from its unit direction.

    PCA is exact and keeps little of the variance; UMAP keeps neighbourhoods, while its distances
    between clusters mean nothing. Signs of PCA are fixed: the largest entry of each axis is
    positive.

    Raises:
        ValueError: If UMAP is wanted and not installed, or there are fewer than 3 latents.
    """
    if len(dec_rows) < 3:
        raise ValueError(f"dec_rows must be at least 3 latents for a map, got {len(dec_rows)}")
    unit = torch.nn.functional.normalize(dec_rows.detach().float().cpu(), dim=1)
    if method == "umap":
        return torch.from_numpy(_umap(n_neighbours, seed).fit_transform(unit.numpy())).float()
    centred = unit - unit.mean(dim=0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes[:, -2:].flip(1)
    largest = axes.abs().argmax(dim=0)
    return centred @ (axes * axes[largest, [0, 1]].sign())


def _umap(n_neighbours: int, seed: int) -> Any:
    if find_spec("umap") is None:
        raise ValueError(
            "method must be 'pca' where umap-learn is missing, got 'umap'; "
            "install monosema[umap] for it"
        )
    import umap  # pyright: ignore[reportMissingImports]

    return umap.UMAP(n_neighbors=n_neighbours, metric="cosine", random_state=seed)
