"""The map of a dictionary, written: atlas.parquet, a row per latent, and atlas.json.

It has a picture of the directions in two dimensions (t-SNE, PCA, or UMAP where it is installed) and
groups of latents with similar directions, with what their labels have in common.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix
from sklearn.cluster import MiniBatchKMeans
from sklearn.manifold import TSNE
from torch import Tensor

from activations_cache import seals
from activations_cache.checks import Progress, require_extra, silent
from monosema.checks import MonosemaError
from sae.autoencoder import SparseAutoencoder
from sae.explain.config import AtlasConfig
from sae.explain.firings import CAUTION, MaxCorrelation, before, summary_of_largest
from sae.explain.tables import WRITING, as_json
from sae.explain.text_at_rows import Cache
from sae.neighbours import Nearest, Splitting, nearest, splitting
from sae.statistics import one_thread

Method = Literal["tsne", "pca", "umap"]

LARGE = 20_000
"""From this many latents on t-SNE lays out a sample and puts the others beside it."""

_SAMPLE = 10_000
_N_ANCHORS = 3
_PERPLEXITY = 15.0
_SMALL_INITIAL = 1e-4  # standard deviation of the first axis; larger values tear neighbours apart


def plane(
    dec_rows: Float[Tensor, "d_sae d_out"], method: Method = "tsne", *, seed: int = 0
) -> Float[Tensor, "d_sae 2"]:
    """Two coordinates for every latent, from its unit direction.

    t-SNE and UMAP keep neighbourhoods; distances between far points mean nothing. PCA is exact and
    keeps little of the variance. PCA and t-SNE draw nothing at random and use one thread, so a
    machine gives the same coordinates whatever its number of threads; UMAP goes by the seed.

    From `LARGE` latents on, t-SNE lays out 10,000 evenly spread latents. Each of the others lies
    at the weighted mean of its 3 nearest among them.

    Raises:
        ValueError: If UMAP is wanted and not installed, there are fewer than 3 latents, or a row
            is not finite.
    """
    if len(dec_rows) < 3:
        raise MonosemaError(f"dec_rows must be at least 3 latents for a map, got {len(dec_rows)}")
    rows = dec_rows.detach().float().cpu()
    bad = int((~rows.isfinite().all(dim=1)).sum())
    if bad:
        raise MonosemaError(f"dec_rows must be finite, got {bad} rows with nan or infinity")
    unit = torch.nn.functional.normalize(rows, dim=1)
    if method == "umap":
        return torch.from_numpy(_umap(seed).fit_transform(unit.numpy())).float()
    with one_thread():  # else t-SNE makes another picture
        if method == "pca":
            return _pca(unit)
        return _tsne(unit) if len(unit) < LARGE else _sampled_tsne(unit)


def share_preserved(
    dec_rows: Float[Tensor, "d_sae d_out"],
    at: Float[Tensor, "d_sae 2"],
    k: int = 10,
    n_sample: int = 1000,
) -> float:
    """Of each latent's k nearest directions, the share among its k nearest points of a plane.

    Args:
        dec_rows: Directions.
        at: Their points.
        k: Neighbours; at most all others.
        n_sample: Latents, evenly spread, over which the mean is taken.
    """
    n = len(dec_rows)
    k = min(k, n - 1)
    sample = _spread(n, n_sample)
    itself = torch.arange(len(sample))
    unit = torch.nn.functional.normalize(dec_rows.detach().float().cpu(), dim=1)
    cosine = unit[sample] @ unit.T
    cosine[itself, sample] = -torch.inf
    distance = torch.cdist(at[sample], at)
    distance[itself, sample] = torch.inf
    by_direction = cosine.topk(k, dim=1).indices
    by_point = distance.topk(k, dim=1, largest=False).indices
    return float((by_direction[:, :, None] == by_point[:, None]).any(dim=2).float().mean())


def _spread(n: int, n_sample: int) -> Tensor:
    return torch.linspace(0, n - 1, min(n, n_sample), dtype=torch.float64).round().long()


def _pca(unit: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "d_sae 2"]:
    """On the two main axes; the largest entry of each axis is positive."""
    centred = unit - unit.mean(dim=0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes[:, -2:].flip(1)
    largest = axes.abs().argmax(dim=0)
    return centred @ (axes * axes[largest, [0, 1]].sign())


def _tsne(unit: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "d_sae 2"]:
    """Barnes-Hut t-SNE on exact neighbours by cosine, from the plane of PCA."""
    n = len(unit)
    perplexity = min(_PERPLEXITY, (n - 1) / 3)
    start = _pca(unit)
    width = start[:, 0].std()
    if width < 1e-6:  # all directions are the same
        return start
    initial: Any = (start / width * _SMALL_INITIAL).numpy()  # sklearn's hints know names alone
    method = TSNE(
        perplexity=perplexity,
        metric="precomputed",
        init=initial,
        angle=0.7,
        max_iter=400,
    )
    return torch.from_numpy(method.fit_transform(_distances(unit, perplexity))).float()


def _distances(unit: Float[Tensor, "d_sae d_out"], perplexity: float) -> csr_matrix:
    """Distance of each latent to itself and to as many neighbours as t-SNE asks for."""
    n = len(unit)
    near = nearest(
        unit, unit, min(n - 1, int(3 * perplexity + 1)), excluded=torch.arange(len(unit))
    )
    far = (2 - 2 * near.cosine).clamp_min(0).sqrt().numpy()
    column = np.column_stack([np.arange(n), near.latent.numpy()])
    value = np.column_stack([np.zeros(n, far.dtype), far])
    ends = np.arange(0, value.size + 1, value.shape[1])
    return csr_matrix((value.ravel(), column.ravel(), ends), shape=(n, n))


def _sampled_tsne(unit: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "d_sae 2"]:
    sample = _spread(len(unit), _SAMPLE)
    at = _tsne(unit[sample])
    near = nearest(unit, unit[sample], _N_ANCHORS)
    weight = near.cosine.clamp_min(1e-3) ** 8  # the nearest counts most
    weight = weight / weight.sum(dim=1, keepdim=True)
    points = (at[near.latent] * weight[:, :, None]).sum(dim=1)
    points[sample] = at
    return points


def _umap(seed: int) -> Any:
    require_extra("umap", "method 'umap'", "umap")
    import umap  # pyright: ignore[reportMissingImports]

    return umap.UMAP(n_neighbors=15, metric="cosine", random_state=seed)


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
    result = torch.from_numpy(means.fit_predict(unit.numpy())).long()
    order = torch.bincount(result, minlength=n).argsort(descending=True, stable=True)
    return order.argsort()[result]


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


ATLAS, SUMMARY = "atlas.parquet", "atlas.json"
_CELLS = 1 << 24  # activations held at once
_LARGEST = 1 << 28  # latents x units that are correlated

SCHEMA = pa.schema({
    "latent": pa.int32(), "x": pa.float32(), "y": pa.float32(),
    "neighbours": pa.list_(pa.int32()), "cosines": pa.list_(pa.float32()),
    "max_correlation": pa.float32(), "parent": pa.int32(), "parent_cosine": pa.float32(),
})  # fmt: skip


def draw_atlas(
    dictionary: SparseAutoencoder,
    cache: Cache,
    hook_point: str,
    config: AtlasConfig,
    out_dir: Path,
    *,
    narrow: SparseAutoencoder | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Coordinates, neighbours, the largest correlation with the stream's coordinates, parents.

    Args:
        dictionary: Whose latents.
        cache: Its rows.
        hook_point: Which.
        config: How.
        out_dir: Where the files go.
        narrow: A narrower dictionary of the same stream, whose latents are the parents.
        progress: Called after each chunk of rows.

    Returns:
        What atlas.json says.
    """
    rows = dictionary.dec_rows.detach().float().cpu()
    at = plane(rows, config.plane)
    near = nearest(
        rows, rows, min(config.n_neighbours, len(rows) - 1), excluded=torch.arange(len(rows))
    )
    report = progress or silent
    correlation = _correlation(dictionary, cache, (hook_point, hook_point), config.n_rows, report)
    split = None if narrow is None else splitting(narrow.dec_rows.detach().float().cpu(), rows)
    with seals.replacing(out_dir / ATLAS) as unfinished:
        pq.write_table(_table(at, near, correlation, split), unfinished, **WRITING)
    summary: dict[str, Any] = {"caution": CAUTION, "config": asdict(config)}
    if known := summary_of_largest(correlation):
        summary["correlation_with_the_stream"] = known
    summary["neurons"] = _with_neurons(dictionary, cache, hook_point, config.n_rows, report)
    if split is not None:
        summary["splitting"] = {
            "without_a_parent": int((split.parent < 0).sum()),
            "parents_with_several_children": int((split.n_children > 1).sum()),
            "most_children": int(split.n_children.max()),
        }
    seals.write(out_dir, {SUMMARY: as_json(summary)})
    return summary


def _with_neurons(
    dictionary: SparseAutoencoder,
    cache: Cache,
    hook_point: str,
    n_rows: int,
    report: Progress,
) -> dict[str, Any]:
    """The largest correlation with a unit of any hook point that lies before this one."""
    earlier = before(hook_point, cache.hook_points)
    if not earlier:
        return {"reason": f"the cache has no hook point before {hook_point}"}
    of_each = [
        _correlation(dictionary, cache, (hook_point, point), n_rows, report) for point in earlier
    ]
    largest = torch.stack(of_each).nan_to_num(nan=-1.0).amax(dim=0)
    known = torch.where(largest >= 0, largest, torch.nan)
    return {"hook_points": list(earlier), **summary_of_largest(known)}


def _correlation(
    dictionary: SparseAutoencoder,
    cache: Cache,
    hook_points: tuple[str, str],
    n_rows: int,
    report: Progress,
) -> Float[Tensor, " d_sae"]:
    """Of latents that read one hook point with the units of another, over evenly spread rows.

    nan for silent latents, and for all where the table is too large.
    """
    read, units = (cache[point] for point in hook_points)
    ids = cache.rows(("explain", "score"))
    ids = ids[:: max(1, -(-len(ids) // n_rows))]
    d_sae, n_units = dictionary.config.d_sae, units[ids[:1]].shape[1]
    if d_sae * n_units > _LARGEST:
        return torch.full((d_sae,), torch.nan)
    result = MaxCorrelation(d_sae, n_units)
    step = max(1, _CELLS // d_sae)
    for first in range(0, len(ids), step):
        rows = ids[first : first + step]
        with torch.no_grad():
            latents = dictionary.encode_dense(read[rows].to(dictionary.enc_rows.device))
        result.update(latents.cpu(), units[rows].cpu())
        report(min(first + step, len(ids)), len(ids), f"rows correlated with {hook_points[1]}")
    return result.compute()


def _table(
    at: Float[Tensor, "d_sae 2"],
    near: Nearest,
    correlation: Float[Tensor, " d_sae"],
    split: Splitting | None,
) -> pa.Table:
    none = pa.nulls(len(at))
    columns = {
        "latent": range(len(at)),
        "x": at[:, 0].numpy(),
        "y": at[:, 1].numpy(),
        "neighbours": near.latent.tolist(),
        "cosines": near.cosine.tolist(),
        "max_correlation": pa.array(correlation.numpy(), from_pandas=True),
        "parent": none if split is None else split.parent.numpy(),
        "parent_cosine": none if split is None else split.cosine.numpy(),
    }
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)
