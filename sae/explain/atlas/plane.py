"""A picture of directions in two dimensions: PCA always, UMAP where it is installed.

Groups of latents with similar directions, and what their labels have in common.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from activations_cache.config import require_extra


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
    require_extra("umap", "method 'umap'", "umap")
    import umap  # pyright: ignore[reportMissingImports]

    return umap.UMAP(n_neighbors=n_neighbours, metric="cosine", random_state=seed)


_BATCH = 4096


def clusters(
    dec_rows: Float[Tensor, "d_sae d_out"], n: int, *, seed: int = 0
) -> Int[Tensor, " d_sae"]:
    """K-means over unit directions: the group of each latent, the largest group first.

    That latents share a group says their directions lie nearer to one centre than to the others,
    no more; most directions of a dictionary are nearly orthogonal.
    """
    unit = torch.nn.functional.normalize(dec_rows.detach().float().cpu(), dim=1)
    n = min(n, len(unit))
    means = MiniBatchKMeans(n, random_state=seed, n_init="auto", batch_size=_BATCH)
    found = torch.from_numpy(means.fit_predict(unit.numpy())).long()
    order = torch.bincount(found, minlength=n).argsort(descending=True, stable=True)
    return order.argsort()[found]


def cluster_names(
    cluster: Int[Tensor, " d_sae"], words: Sequence[Sequence[str]], n: int, n_words: int = 3
) -> list[str]:
    """For each group the words that its labels have more often than those of the others.

    Args:
        cluster: Group of each latent.
        words: What each latent's label lists; empty for a latent without a label.
        n: Number of groups.
        n_words: Words of a name.
    """
    everywhere = Counter(word for listed in words for word in set(listed))
    inside = [Counter[str]() for _ in range(n)]
    for group, listed in zip(cluster.tolist(), words, strict=True):
        inside[group].update(set(listed))
    names = []
    for counts in inside:
        # count^2 / total: often here, and mostly here
        ranked = sorted(counts, key=lambda word: (-(counts[word] ** 2) / everywhere[word], word))
        names.append(", ".join(word.strip() for word in ranked[:n_words]))
    return names
