"""One page about what a cache holds: norms, massive dimensions, effective rank."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from activations_cache.checks import Progress, silent
from activations_cache.config import TRAINING_SPLITS
from activations_cache.reader import ActivationCache

SAMPLE_ROWS = 25_600
"""As many as RankMe's authors found enough for a stable rank."""

N_BINS = 24
N_MASSIVE = 5
MASSIVE = 8.0
"""A dimension is massive if its root mean square is this many times the median dimension's."""


@dataclass(frozen=True)
class MassiveDimension:
    """A dimension that carries far more than its share."""

    dimension: int
    """Its number."""
    rms: float
    """Root mean square of its values."""
    ratio: float
    """The same over the median dimension's."""


@dataclass(frozen=True)
class HookSummary:
    """What one hook point's rows look like, by a sample spread evenly over the cache."""

    hook_point: str
    """Which."""
    n_sampled: int
    """Rows in the sample."""
    norm_edges: tuple[float, ...]
    """Edges of the histogram's bins, on a logarithmic scale."""
    norm_counts: tuple[int, ...]
    """Rows in each bin."""
    massive: tuple[MassiveDimension, ...]
    """Massive dimensions, the largest first, at most N_MASSIVE."""
    effective_rank: float
    """RankMe: exp of the entropy of the normalised singular values (arXiv 2210.02885)."""
    mean_share: float
    """Share of the mean square norm that the mean row accounts for."""


def summarise(
    cache: ActivationCache, hook_point: str, progress: Progress | None = None
) -> HookSummary:
    """Describe the training rows of a hook point.

    Args:
        cache: A complete cache.
        hook_point: One of its hook points.
        progress: Called while rows are read.
    """
    progress = progress or silent
    hook, rows = cache[hook_point], cache.rows(TRAINING_SPLITS)
    rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), SAMPLE_ROWS)).round().long()]
    gram = torch.zeros(hook.d_model, hook.d_model, dtype=torch.float64)
    for part in rows.split(2048):
        x = hook[part].double()
        gram += x.T @ x
        progress(int(part[-1]) + 1, int(rows[-1]) + 1, "rows looked at")
    rms = (gram.diagonal() / len(rows)).sqrt()
    counts, edges = _histogram(hook.norms(rows))
    mean_square = hook.mean.double().square().sum().item()
    return HookSummary(
        hook_point=hook_point,
        n_sampled=len(rows),
        norm_edges=edges,
        norm_counts=counts,
        massive=_massive(rms),
        effective_rank=effective_rank(gram),
        mean_share=mean_square / max(hook.mean_square_norm, torch.finfo(torch.float32).tiny),
    )


def effective_rank(gram: Float[Tensor, "d_model d_model"]) -> float:
    """Return RankMe of a matrix X from X^T X: exp of the entropy of its singular values' shares.

    Source: Garrido et al., arXiv 2210.02885, equation 1; X is not centred.
    """
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(torch.finfo(gram.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())


def _massive(rms: Float[Tensor, " d_model"]) -> tuple[MassiveDimension, ...]:
    ratio = rms / rms.median().clamp_min(torch.finfo(rms.dtype).tiny)
    order = ratio.argsort(descending=True)[:N_MASSIVE].tolist()
    return tuple(
        MassiveDimension(i, float(rms[i]), float(ratio[i])) for i in order if ratio[i] >= MASSIVE
    )


def _histogram(norms: Float[Tensor, " row"]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    positive = norms[norms > 0].double().numpy()
    if not len(positive):
        return (len(norms),), (0.0, 0.0)
    low, high = positive.min(), positive.max()
    edges = np.geomspace(low * (1 - 1e-9), high * (1 + 1e-9), N_BINS + 1)
    counts = np.histogram(positive, edges)[0]
    return tuple(counts.tolist()), tuple(edges.tolist())
