"""The batches of a cache straight from the model, without a disk."""

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from activations_cache.batches import Batch, RowOrder, count_batches, read_batches
from activations_cache.builder import RowSource, forward_ranges, load_on_device, load_source
from activations_cache.checks import NonFiniteError, Progress, silent
from activations_cache.config import SPLITS, TRAINING_SPLITS, CacheConfig
from activations_cache.shard import rows_of

WINDOW_ROWS = 32768
"""Rows that are shuffled among each other; up to twice as many are held in memory."""


def stream(config: CacheConfig, *, progress: Progress | None = None) -> "ActivationStream":
    """Load the model and the text of a configuration, to read batches without a cache.

    Args:
        config: What `build` would build; its `rows_per_shard` still decides which contexts the
            model reads together.
        progress: Called while weights are hashed and the text is packed.
    """
    progress = progress or silent
    source = load_source(config, load_on_device(config, progress), progress)
    return ActivationStream(source, config.contexts_per_forward)


class ActivationStream:
    """Batches like those of an `ActivationCache`, from a model that runs meanwhile.

    Rows have the numbers and the values that they have in the cache of the same configuration,
    each once per epoch. Only the order differs: whole forwards are permuted, then the rows of
    about `WINDOW_ROWS` consecutive ones.

    Args:
        source: The model and its examples.
        contexts_per_forward: Examples that the model reads at once.
    """

    def __init__(self, source: RowSource, contexts_per_forward: int) -> None:
        self.hook_points = tuple(source.plan.hook_points)
        self._source = source
        self._contexts_per_forward = contexts_per_forward
        per_forward = contexts_per_forward * source.plan.rows_per_example
        self._window = max(1, WINDOW_ROWS // per_forward)

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
        return count_batches(len(self.rows(splits)), batch=batch, start=start, epochs=epochs)

    def batches(
        self,
        hook_points: Sequence[str] | None = None,
        *,
        batch: int,
        seed: int,
        splits: Sequence[str] = TRAINING_SPLITS,
        start: int = 0,
        epochs: int = 1,
    ) -> Iterator[Batch]:
        """Yield shuffled batches; the arguments are those of `ActivationCache.batches`.

        Starting later runs the model on nothing that only earlier windows need.

        Raises:
            NonFiniteError: From the iterator, at a row that is not finite.
            ValueError: If an argument is out of range.
        """
        rows = self.rows(splits).numpy()
        count_batches(len(rows), batch=batch, start=start, epochs=epochs)
        total = count_batches(len(rows), batch=batch, epochs=epochs)
        forwards = self._forwards(splits)
        starts = np.cumsum([0, *(len(forward.rows) for forward in forwards[:-1])])
        run = lru_cache(maxsize=2 * self._window)(
            lambda forward: self._run(forwards[forward].examples, hook_points or self.hook_points)
        )

        def read(numbers: Int64[np.ndarray, " row"]) -> Float[Tensor, "row d_in"]:
            of_row = np.searchsorted(rows[starts], numbers, side="right") - 1
            needed, part = np.unique(of_row, return_inverse=True)
            known = [run(forward) for forward in needed.tolist()]
            out = torch.empty(len(numbers), known[0].x.shape[1])
            for index, batch_rows in enumerate(known):
                here = np.flatnonzero(part == index)
                at = np.searchsorted(batch_rows.rows.numpy(), numbers[here])
                out[torch.from_numpy(here)] = batch_rows.x[torch.from_numpy(at)]
            return out

        order = RowOrder(rows, starts, window=self._window, seed=seed)
        # One batch at a time: to run the model early would hold more of it in memory.
        return read_batches(order, read, batch=batch, numbers=range(start, total), at_once=0)

    def _forwards(self, splits: Sequence[str]) -> list["_Forward"]:
        """Return the forwards that give rows of some splits, and these rows' numbers."""
        plan = self._source.plan
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
        return [forward for forward in forwards if len(forward.rows)]

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

    def _run(self, examples: range, hook_points: Sequence[str]) -> Batch:
        """Run the model once; the values are rounded as a cache rounds them."""
        plan = self._source.plan
        rows, kept_out = rows_of(plan, self._source.examples, examples, self._source(examples))
        if kept_out:
            example, position = kept_out[0].example, kept_out[0].position
            raise NonFiniteError(
                f"rows must be finite in {plan.dtype}, got one that is not at position {position} "
                f"of example {example}; build a cache, which keeps a few such rows out"
            )
        x = torch.cat([rows.acts[name].cpu().float() for name in hook_points], dim=1)
        return Batch(x, torch.from_numpy(self._numbers(np.array(examples))))


class _Forward(NamedTuple):
    """What the model reads at once, and the numbers of the wanted rows that it gives."""

    examples: range
    rows: Int64[np.ndarray, " row"]
