"""The batches of a cache straight from the model, without a disk.

A buffer holds the rows of two windows. While the rows of one are used, a thread runs the model on
the examples of the next; on a GPU it does so on a stream of its own, beside the training step.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from activations_cache.batches import ALL, Batch, RowOrder, RowWindow, count_batches, read_batches
from activations_cache.builder import (
    ModelSource,
    RowSource,
    forward_ranges,
    load_on_device,
    load_source,
)
from activations_cache.checks import MonosemaError, NonFiniteError, Progress, silent
from activations_cache.config import SPLITS, TRAINING_SPLITS, CacheConfig
from activations_cache.image_rows import ImageRows
from activations_cache.images import read_images
from activations_cache.reader import ActivationCache
from activations_cache.shard import is_in, rows_of
from activations_cache.writer import MAX_QUARANTINED

BUFFER_ROWS = 65536
"""Rows in memory at most; those of a half of it are shuffled among each other."""


def stream(
    config: CacheConfig, *, buffer_rows: int = BUFFER_ROWS, progress: Progress | None = None
) -> "ActivationStream":
    """Load the model and the text of a configuration, to read batches without a cache.

    Args:
        config: What `build` would build; its `rows_per_shard` still decides which contexts the
            model reads together.
        buffer_rows: Rows in memory at most; those of a half of it are shuffled among each other.
        progress: Called while weights are hashed and the text is packed.
    """
    progress = progress or silent
    source = load_source(config, load_on_device(config, progress), progress)
    return ActivationStream(source, config.contexts_per_forward, buffer_rows=buffer_rows)


def stream_beside(
    cache: ActivationCache, config: CacheConfig, place: Path | None, progress: Progress
) -> ModelSource | ImageRows:
    """Load what gives rows to train on beside a cache: no example of it, and none that is held out.

    Args:
        cache: What is looked at and measured on.
        config: That of the cache, with the rows of both together as `n_rows`.
        place: Where several processes that need the same text keep it.
        progress: Called while weights are hashed and the text is packed.

    Raises:
        MonosemaError: If the model is another one than that of the cache, or no example is left.
    """
    source = load_source(config, load_on_device(config, progress), progress, place)
    made, now = (identity.get("model") for identity in (cache.identity, source.plan.identity))
    if made != now:
        raise MonosemaError(
            f"{config.model.path} must be the model of {cache.path}, {made}, got {now}; build that "
            "cache again"
        )
    known, keys = set(_keys(cache)), _keys(source)
    wanted = is_in(source.examples.split, TRAINING_SPLITS).tolist()
    kept = [n for n, key in enumerate(keys) if wanted[n] and key not in known]
    if not kept:
        raise MonosemaError(
            f"the data must hold examples that {cache.path} does not, got {len(keys)} and all of "
            "them in it; add data or lower cache.n_rows"
        )
    source.keep(torch.tensor(kept), f"examples to train on that are not in {cache.fingerprint}")
    return source


def _keys(source: ActivationCache | ModelSource | ImageRows) -> list[bytes]:
    """Return what tells each example from the others: its tokens, or the hash of its image."""
    if isinstance(source, ImageRows):
        return [record.sha256.encode() for record in source.records]
    if isinstance(source, ActivationCache) and "images" in source.identity:
        return [record.sha256.encode() for record in read_images(source)]
    return [ids.tobytes() for ids in source.examples.tokens.numpy().astype(np.int32)]


class ActivationStream:
    """Batches like those of an `ActivationCache`, from a model that runs meanwhile.

    Rows have the numbers and the values that they have in the cache of the same configuration,
    each once per epoch. Only the order differs: whole forwards are permuted, then the rows of each
    window of consecutive ones. In the place of a row that is not finite, or above a limit, stands
    another one of its window.

    Args:
        source: The model and its examples.
        contexts_per_forward: Examples that the model reads at once.
        buffer_rows: Rows in memory at most.
        limits: The largest norm that a row may have, by hook point.
        share: The place of this process among those that share the examples, and their number.
        n_rows: Rows of an epoch of all processes; those there are, when absent.
        progress: Called while the buffer is filled for the first time.

    Raises:
        MonosemaError: If the buffer cannot hold what the model gives at once, twice.
    """

    def __init__(
        self,
        source: RowSource,
        contexts_per_forward: int,
        *,
        buffer_rows: int = BUFFER_ROWS,
        limits: Mapping[str, float] | None = None,
        share: tuple[int, int] = (0, 1),
        n_rows: int | None = None,
        progress: Progress = silent,
    ) -> None:
        self.hook_points = tuple(source.plan.hook_points)
        self.fingerprint = source.plan.fingerprint
        self.n_left_out = 0
        """Rows that were left out, as far as the model has run."""
        self._source = source
        self._contexts_per_forward = contexts_per_forward
        per_forward = contexts_per_forward * source.plan.rows_per_example
        self._window = buffer_rows // (2 * per_forward)
        if not self._window:
            raise MonosemaError(
                f"buffer_rows must be at least {2 * per_forward:,}, two forwards of "
                f"{contexts_per_forward} examples, got {buffer_rows:,}; raise it"
            )
        self._limits, self._share = limits or {}, share
        self._n_rows, self._progress = n_rows, progress
        self._forwards_of: dict[tuple[str, ...], list[_Forward]] = {}

    def rows(self, splits: Sequence[str] = SPLITS) -> Int64[Tensor, " row"]:
        """Return the numbers of the rows of the named splits, ascending."""
        return torch.from_numpy(np.concatenate([f.rows for f in self._forwards(splits)]))

    def n_batches(
        self,
        *,
        batch: int,
        splits: Sequence[str] = TRAINING_SPLITS,
        start: int = 0,
        epochs: int = 1,
    ) -> int:
        """Return how many batches `batches` gives for the same arguments."""
        n_rows = self._n_rows or sum(len(f.rows) for f in self._forwards(splits))
        return count_batches(n_rows, batch=batch, start=start, epochs=epochs)

    def batches(  # noqa: PLR0913
        self,
        hook_points: Sequence[str] | None = None,
        *,
        batch: int,
        seed: int,
        splits: Sequence[str] = TRAINING_SPLITS,
        start: int = 0,
        epochs: int = 1,
        part: slice = ALL,
        as_stored: bool = False,
    ) -> Generator[Batch]:
        """Yield shuffled batches; the arguments are those of `ActivationCache.batches`.

        Starting later runs the model on nothing that only earlier windows need. Of several
        processes each gives as many rows as `part` says, of its own examples.

        Raises:
            NonFiniteError: From the iterator, where too many rows of a window are not finite.
            ValueError: If an argument is out of range.
        """
        self.n_batches(batch=batch, splits=splits, start=start, epochs=epochs)
        total = self.n_batches(batch=batch, splits=splits, epochs=epochs)
        rank, n_ranks = self._share
        forwards = self._forwards(splits)[rank::n_ranks]
        if not forwards:
            raise MonosemaError(
                f"processes must be at most {rank}, one for each forward of the model, got "
                f"{n_ranks}; start fewer"
            )
        rows = np.concatenate([forward.rows for forward in forwards])
        starts = np.cumsum([0, *(len(forward.rows) for forward in forwards[:-1])])
        order = RowOrder(rows, starts, window=self._window, seed=seed)
        size = len(range(*part.indices(batch)))
        points = tuple(hook_points or self.hook_points)
        return self._read(order, forwards, points, size, range(start, total), as_stored)

    def _read(
        self,
        order: RowOrder,
        forwards: list["_Forward"],
        points: tuple[str, ...],
        size: int,
        numbers: range,
        as_stored: bool,
    ) -> Generator[Batch]:
        """Yield batches of `size` rows; the model runs in a thread that ends with the iterator."""
        with ThreadPoolExecutor(1, thread_name_prefix="activations-model") as thread:
            # Beside the stream of the training step, or the two would take turns.
            side = torch.cuda.Stream() if torch.cuda.is_available() else None

            def run(forward: int) -> "_Run":
                with torch.cuda.stream(side):
                    return self._run(forwards[forward].examples, points)

            buffer = _Buffer(order, lambda f: thread.submit(run, f), self._left_out, self._progress)
            read = buffer.read if as_stored else lambda rows: buffer.read(rows).float()
            # One batch at a time: the buffer is what is read ahead.
            batches = read_batches(buffer.take, read, batch=size, numbers=numbers, at_once=0)
            try:
                for batch in batches:  # noqa: UP028  # which would close them first
                    yield batch
            finally:  # the reader must not wait for a window that nobody will use
                thread.shutdown(wait=False, cancel_futures=True)
                batches.close()

    def _left_out(self, n: int) -> None:
        self.n_left_out += n

    def _forwards(self, splits: Sequence[str]) -> list["_Forward"]:
        """Return the forwards that give rows of some splits, and these rows' numbers."""
        key, plan = tuple(splits), self._source.plan
        if key in self._forwards_of:
            return self._forwards_of[key]
        split = self._source.examples.split.numpy()
        wanted = np.isin(split, [SPLITS.index(name) for name in splits])
        every = (
            examples
            for shard in range(plan.n_shards)
            for examples in forward_ranges(plan.examples_of(shard), self._contexts_per_forward)
        )
        forwards = [
            _Forward(f, self._numbers(np.array(f)[wanted[f.start : f.stop]])) for f in every
        ]
        self._forwards_of[key] = [forward for forward in forwards if len(forward.rows)]
        return self._forwards_of[key]

    @cached_property
    def _bounds(self) -> tuple[Int64[np.ndarray, " example"], Int64[np.ndarray, " example"]]:
        """Return the global number of each example's first row, and how many rows it gives."""
        plan, examples = self._source.plan, self._source.examples
        n_rows = examples.gives_row(slice(None), plan.skip_positions, plan.exclude_tokens)
        n_rows = n_rows.sum(dim=1).numpy()
        first = np.concatenate([
            shard * plan.rows_per_shard + np.cumsum(n_rows[part]) - n_rows[part]
            for shard, part in ((s, plan.examples_of(s)) for s in range(plan.n_shards))
        ])
        return first, n_rows

    def _numbers(self, examples: Int64[np.ndarray, " example"]) -> Int64[np.ndarray, " row"]:
        """Return the global numbers of all rows of some examples."""
        first, n_rows = (values[examples] for values in self._bounds)
        within = np.arange(n_rows.sum()) - np.repeat(np.cumsum(n_rows) - n_rows, n_rows)
        return np.repeat(first, n_rows) + within

    def _run(self, examples: range, hook_points: Sequence[str]) -> "_Run":
        """Run the model once; the values are rounded as a cache rounds them."""
        plan = self._source.plan
        rows, kept_out = rows_of(plan, self._source.examples, examples, self._source(examples))
        numbers = self._numbers(np.array(examples))
        within = torch.ones(len(rows.example), dtype=torch.bool)
        for name, limit in self._limits.items():
            within &= rows.norm[name].float().cpu() <= limit
        x = torch.cat([rows.acts[name].cpu() for name in hook_points], dim=1)
        if not kept_out:
            return _Run(x, numbers, within, 0)
        args = (plan.skip_positions, plan.exclude_tokens)
        some = slice(examples.start, examples.stop)
        example, position = self._source.examples.gives_row(some, *args).nonzero().T
        places = (rows.example - examples.start) * plan.context + rows.position
        finite = torch.isin(example * plan.context + position, places).nonzero()[:, 0]
        whole = x.new_zeros(len(numbers), x.shape[1]).index_copy_(0, finite, x)
        good = torch.zeros(len(numbers), dtype=torch.bool).index_copy_(0, finite, within)
        return _Run(whole, numbers, good, len(kept_out))


class _Forward(NamedTuple):
    """What the model reads at once, and the numbers of the wanted rows that it gives."""

    examples: range
    rows: Int64[np.ndarray, " row"]


class _Run(NamedTuple):
    """What the model gave for a forward."""

    x: Float[Tensor, "row d_in"]
    """In the dtype in which they are rounded."""
    rows: Int64[np.ndarray, " row"]
    """Their numbers, ascending."""
    good: Bool[Tensor, " row"]
    """Whether a row is finite and within the limits."""
    n_not_finite: int


class _Buffer:
    """The rows of the windows that are read, and of the next one.

    Args:
        order: Which row stands where.
        submit: Lets the model run on a forward, after those that were submitted before.
        left_out: Called with the number of rows of a window that are left out.
        progress: Called while the first window is filled.
    """

    def __init__(
        self,
        order: RowOrder,
        submit: Callable[[int], "Future[_Run]"],
        left_out: Callable[[int], None],
        progress: Progress,
    ) -> None:
        self._order, self._submit, self._left_out = order, submit, left_out
        self._progress = progress
        self._runs: dict[RowWindow, dict[int, Future[_Run]]] = {}
        self._rows: dict[RowWindow, Int64[np.ndarray, " row"]] = {}
        self._taken: list[RowWindow] = []

    def take(self, start: int, stop: int) -> Int64[np.ndarray, " row"]:
        """Return the rows at some positions; others stand in the place of those left out."""
        spans = self._order.spans(start, stop)
        if not spans:
            return self._order.rows[:0]
        self._taken = held = [window for window, _ in spans]
        after = self._order.after(held[0])
        held = held if after in held else [*held, after]
        known = {f: run for runs in self._runs.values() for f, run in runs.items()}
        for window in held:
            for f in self._order.blocks(*window).tolist():
                known[f] = known.get(f) or self._submit(f)
        self._runs = {w: {f: known[f] for f in self._order.blocks(*w).tolist()} for w in held}
        self._rows = {w: rows for w, rows in self._rows.items() if w in held}
        return np.concatenate([self._rows_of(window)[inside] for window, inside in spans])

    def read(self, numbers: Int64[np.ndarray, " row"]) -> Float[Tensor, "row d_in"]:
        """Return rows that `take` has just given."""
        out: Tensor | None = None
        for run in (f.result() for window in self._taken for f in self._runs[window].values()):
            at = np.minimum(np.searchsorted(run.rows, numbers), len(run.rows) - 1)
            here = np.flatnonzero(run.rows[at] == numbers)
            if out is None:
                out = torch.empty(len(numbers), run.x.shape[1], dtype=run.x.dtype)
            out[torch.from_numpy(here)] = run.x[torch.from_numpy(at[here])]
        assert out is not None, "what was taken was run"
        return out

    def _rows_of(self, window: RowWindow) -> Int64[np.ndarray, " row"]:
        """Return the rows of a window in their order, once the model has given all of them."""
        if window in self._rows:
            return self._rows[window]
        runs = []
        for future in self._runs[window].values():
            runs.append(future.result())
            if not self._rows:
                self._progress(len(runs), len(self._runs[window]), "forwards into the buffer")
        rows = self._order.window_rows(*window)
        _require_finite(sum(run.n_not_finite for run in runs), len(rows))
        bad = [run.rows[~run.good.numpy()] for run in runs]
        good = ~np.isin(rows, np.concatenate(bad))
        if not good.all():
            self._left_out(int((~good).sum()))
            rows = _without(rows, good)
        self._rows[window] = rows
        return rows


def _without(
    rows: Int64[np.ndarray, " row"], good: Bool[np.ndarray, " row"]
) -> Int64[np.ndarray, " row"]:
    """Put in the place of each row that is left out one from half a window further on."""
    left = np.flatnonzero(good)
    if not len(left):
        raise MonosemaError(
            f"rows must not be larger than max_norm allows, got none of {len(rows):,} that is not; "
            "raise train.max_norm"
        )
    bad = np.flatnonzero(~good)
    others = left[(np.searchsorted(left, bad) + len(left) // 2) % len(left)]
    rows = rows.copy()
    rows[bad] = rows[others]
    return rows


def _require_finite(n: int, n_rows: int) -> None:
    if n > max(1, MAX_QUARANTINED * n_rows):
        raise NonFiniteError(
            f"rows must be finite, up to {MAX_QUARANTINED:.2%} of {n_rows:,} rows, got {n:,} that "
            "are not; try another dtype for the model or the cache"
        )
