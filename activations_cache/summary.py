"""What a cache holds: one page of norms, and the rows that are far larger than the others.

A few rows of a hundred times the norm hold most of the sum of squares: attention sinks at tokens
that nobody expects. They take the scale of all inputs and the direction of every step. So a
training run looks at the norms first, and leaves such rows out.

Views of a cache for loops that shuffle by themselves: of torch, and of Hugging Face.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.data import Dataset

from activations_cache.checks import Progress, silent
from activations_cache.config import SPLITS, TRAINING_SPLITS
from activations_cache.reader import ActivationCache, HookRows

if TYPE_CHECKING:
    import datasets

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


LARGEST = 0.001
"""The share of the rows whose weight in the sum of squares is looked at."""
WEIGHTY = 0.05
"""From this share on they decide what a dictionary learns; rows alike hold 0.001."""
_ROWS_AT_ONCE = 1 << 20
_log = logging.getLogger(__name__)


class KeptRows(HookRows):
    """The rows of a hook point, whose mean and norm are those of the rows that are kept."""

    def __init__(
        self, rows: HookRows, rows_left: Int64[Tensor, " left"], left_out: Int64[Tensor, " row"]
    ):
        vars(self).update({name: v for name, v in vars(rows).items() if name != "mean"})
        self._all, self._rows_left, self._left_out = rows, rows_left, left_out

    @cached_property
    def mean(self) -> Float[Tensor, " d_model"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The mean of the kept training rows, float32."""
        n_left_out = len(self._left_out)
        total = self._all.mean.double() * (len(self._rows_left) + n_left_out)
        for part in self._left_out.split(_ROWS_AT_ONCE // max(self.d_model, 1) + 1):
            total -= self._all[part].double().sum(dim=0)
        return (total / max(len(self._rows_left), 1)).float()

    @cached_property
    def mean_square_norm(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
        """The mean of the squared norms of the kept training rows."""
        parts = self._rows_left.split(_ROWS_AT_ONCE)
        total = sum(float(self._all.norms(part).double().square().sum()) for part in parts)
        return total / max(len(self._rows_left), 1)


class BoundedCache(ActivationCache):
    """A cache without the rows that are larger than a limit; made by `bounded`."""

    def __init__(self, cache: ActivationCache, limits: dict[str, float]) -> None:
        vars(self).update(vars(cache))
        self._rows_of, self._whole, self.limits = {}, cache, limits
        every = cache.rows(TRAINING_SPLITS)
        rows_left = self.rows(TRAINING_SPLITS)
        left_out = every[~torch.isin(every, rows_left)]
        self.n_left_out = len(left_out)
        """Rows of explain and score that are left out."""
        self._hooks = {
            name: KeptRows(rows, rows_left, left_out) for name, rows in cache._hooks.items()
        }

    def rows(self, splits: Sequence[str] = SPLITS) -> Int64[Tensor, " row"]:
        """Return the numbers of the kept rows of the named splits, ascending."""
        key = tuple(splits)
        if key not in self._rows_of:
            parts = self._whole.rows(splits).split(_ROWS_AT_ONCE)
            self._rows_of[key] = torch.cat([part[self._is_usual(part)] for part in parts])
        return self._rows_of[key]

    def _is_usual(self, rows: Int64[Tensor, " row"]) -> Bool[Tensor, " row"]:
        is_usual = torch.ones(len(rows), dtype=torch.bool)
        for name, limit in self.limits.items():
            is_usual &= self._whole[name].norms(rows) <= limit
        return is_usual


def bounded(
    cache: ActivationCache, hook_points: Sequence[str], times_median: float
) -> ActivationCache:
    """Return the cache without rows larger than so many times the median row.

    Args:
        cache: The cache; it is returned as it is where no row is so large.
        hook_points: Those at which a row may not be so large.
        times_median: The limit, over the median norm of the training rows.
    """
    above = limits(cache, hook_points, times_median)
    largest = {name: cache[name].statistics.norm_quantiles["1"] for name in above}
    above = {name: limit for name, limit in above.items() if largest[name] > limit}
    return BoundedCache(cache, above) if above else cache


def limits(
    cache: ActivationCache, hook_points: Sequence[str], times_median: float
) -> dict[str, float]:
    """Return so many times the median norm of the training rows, by hook point if it is not 0."""
    medians = {name: cache[name].statistics.norm_quantiles["0.5"] for name in hook_points}
    return {name: times_median * median for name, median in medians.items() if median > 0}


def within(
    cache: ActivationCache, hook_points: Sequence[str], times_median: float | None
) -> ActivationCache:
    """Return the cache without rows of any split above the limit that held in a training.

    It is returned as it is where no row of any split is so large.
    """
    if times_median is None:
        return cache
    hold = cache.rows(("hold",))
    above = {
        name: limit
        for name, limit in limits(cache, hook_points, times_median).items()
        if cache[name].statistics.norm_quantiles["1"] > limit
        or bool((cache[name].norms(hold) > limit).any())
    }
    return BoundedCache(cache, above) if above else cache


def looked_at(
    cache: ActivationCache, hook_points: Sequence[str], times_median: float | None
) -> ActivationCache:
    """Say how much the largest rows weigh, and return the cache without those that are too large.

    Args:
        cache: The cache; what is no cache on a disk is returned as it is.
        hook_points: Those that are read or predicted.
        times_median: The limit, over the median norm of the training rows; None for no limit.
    """
    if not isinstance(cache, ActivationCache):
        return cache
    cache_left = cache if times_median is None else bounded(cache, hook_points, times_median)
    for name in hook_points:
        share = share_of_largest(cache, name)
        if isinstance(cache_left, BoundedCache):
            n, limit = cache_left.n_left_out, f"{times_median:g} times the median norm"
            advice = f"{n:,} rows above {limit} are left out; train.max_norm: null keeps them"
        elif share > WEIGHTY and times_median is not None:
            advice = "none is above train.max_norm; a lower limit leaves them out"
        elif share > WEIGHTY:
            advice = "train.max_norm: 10 leaves them out"
        else:
            advice = "nothing to do"
        level = logging.WARNING if share > WEIGHTY else logging.INFO
        what = "the largest 0.1 %% of the rows hold %.1f %% of the sum of squares; %s"
        _log.log(level, f"%s: {what}", name, 100 * share, advice)
    return cache_left


def share_of_largest(cache: ActivationCache, hook_point: str) -> float:
    """Return the share of the sum of squares that the largest 0.1 % of the training rows hold."""
    rows = cache.rows(TRAINING_SPLITS)
    parts = [cache[hook_point].norms(part).numpy() for part in rows.split(_ROWS_AT_ONCE)]
    square = np.concatenate(parts).astype(np.float64) ** 2
    n = max(1, round(LARGEST * len(square)))
    total = float(square.sum())
    return float(np.partition(square, -n)[-n:].sum()) / total if total else 0.0


class RowDataset(Dataset[Tensor]):
    """The rows of a cache for `torch.utils.data.DataLoader`, which shuffles and starts workers.

    `cache.batches` reads in an order that is kind to the disk and goes on from any batch; this is
    for loops that have a DataLoader already.
    """

    def __init__(
        self,
        cache: ActivationCache,
        hook_points: Sequence[str] = (),
        splits: Sequence[str] = SPLITS,
    ) -> None:
        """Take a cache.

        Args:
            cache: It stays open.
            hook_points: Which, side by side; all when empty.
            splits: From which examples.
        """
        self.hooks = [cache[name] for name in hook_points or cache.hook_points]
        self.rows = cache.rows(splits)
        """The numbers of the rows, by their place in this view."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, place: int) -> Float[Tensor, " d_in"]:
        """Return a row."""
        return self.__getitems__([place])[0]

    def __getitems__(self, places: list[int]) -> list[Float[Tensor, " d_in"]]:
        """Return several rows, read at once; a DataLoader asks for a batch so."""
        numbers = self.rows[torch.tensor(places)]
        return [*torch.cat([hook[numbers] for hook in self.hooks], dim=1)]


def as_dataset(
    cache: ActivationCache,
    hook_points: Sequence[str] = (),
    splits: Sequence[str] = SPLITS,
) -> "datasets.Dataset":
    """Return a cache as a `datasets.Dataset` with a row for each row; nothing is copied.

    Its columns are row, example, position, token, split, label where tokens have labels, and a
    column of activations for each hook point, which is read when it is asked for.

    Args:
        cache: It stays open.
        hook_points: Which; all when empty.
        splits: From which examples.
    """
    import datasets  # takes a second, and few ask for it

    hooks = {name: cache[name] for name in hook_points or cache.hook_points}
    rows = cache.rows(splits)
    refs = cache.refs(rows)
    split = cache.examples.split[refs.example]
    columns: dict[str, Any] = {"row": rows.numpy()}
    columns |= {name: values.numpy() for name, values in refs._asdict().items()}
    columns["split"] = [SPLITS[number] for number in split.tolist()]
    if cache.label_names:
        names = (*cache.label_names, None)  # the last one is that of -1
        columns["label"] = [names[number] for number in cache.token_labels(rows).tolist()]

    def read(some: dict[str, Any]) -> dict[str, Any]:
        numbers = torch.tensor(some["row"])
        return {**some, **{name: hook[numbers].numpy() for name, hook in hooks.items()}}

    return datasets.Dataset.from_dict(columns).with_transform(read)
