"""What every source of batches must do; `check_batch_source` is the conformance suite.

A cache on disk and a live model pass it; so must anything else that is to take their place.

A cache without a language model: rows are a seeded linear map of token and position.

For tests, benchmarks and trying things out; everything but the model is as in a real cache.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations_cache.batches import Batch
from activations_cache.config import SPLITS, TRAINING_SPLITS, Compression, Dtype
from activations_cache.manifest import Plan
from activations_cache.reader import ActivationCache, open_cache
from activations_cache.shard import Examples, ShardBuffer
from activations_cache.writer import CacheWriter


@runtime_checkable
class BatchSource(Protocol):
    """The interface of `ActivationCache` and `ActivationStream`, as far as training needs it."""

    hook_points: tuple[str, ...]

    def rows(self, splits: Sequence[str] = SPLITS) -> Int[Tensor, " row"]:
        """Return the numbers of the rows of the named splits, ascending."""
        ...

    def n_batches(
        self, *, batch: int, splits: Sequence[str] = ..., start: int = 0, epochs: int = 1
    ) -> int:
        """Return how many batches `batches` gives for the same arguments."""
        ...

    def batches(
        self,
        hook_points: Sequence[str] | None = None,
        *,
        batch: int,
        seed: int,
        splits: Sequence[str] = ...,
        start: int = 0,
        epochs: int = 1,
    ) -> Iterator[Batch]:
        """Yield shuffled batches."""
        ...


def check_batch_source(source: BatchSource, *, batch: int, seed: int = 0) -> None:
    """Check a source of batches against the contract.

    Args:
        source: What is checked; it must have at least three batches of training rows.
        batch: Rows per batch; it should not divide the number of rows.
        seed: Of the order.

    Raises:
        AssertionError: Naming the first rule that does not hold.
    """
    _check_splits(source)
    _check_order(source, batch, seed)
    _check_coverage(source, batch, seed)
    _check_resuming(source, batch, seed)
    _check_hook_points(source, batch, seed)
    _check_refusals(source, batch, seed)
    _check_early_end(source, batch, seed)


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise AssertionError(f"a source of batches must {rule}")


def _check_splits(source: BatchSource) -> None:
    every, parts = source.rows(), [source.rows((name,)) for name in SPLITS]
    _require(bool((every.diff() > 0).all()), "give row numbers in ascending order, each once")
    joined = torch.cat(parts).sort().values
    _require(torch.equal(joined, every), "put each row into exactly one split")


def _check_coverage(source: BatchSource, batch: int, seed: int) -> None:
    wanted = source.rows(TRAINING_SPLITS)
    epochs, n = 2, len(source.rows(TRAINING_SPLITS))
    results = list(source.batches(batch=batch, seed=seed, epochs=epochs))
    n_batches = source.n_batches(batch=batch, epochs=epochs)
    _require(len(results) == n_batches == epochs * n // batch, "give as many batches as it says")
    for part in results:
        _require(part.x.shape[0] == len(part.rows) == batch, "give whole batches alone")
        _require(part.x.dtype == torch.float32, "give float32")
        _require(bool(part.x.isfinite().all()), "give finite numbers")
    rows = torch.cat([part.rows for part in results])
    _require(torch.equal(rows[:n].sort().values, wanted), "give each row exactly once per epoch")
    again = rows[n:].unique()
    _require(len(again) == len(rows) - n, "give no row twice in the second epoch")
    _require(not torch.equal(rows[:batch], rows[n : n + batch]), "shuffle each epoch anew")
    _check_values(results)


def _check_values(results: list[Batch]) -> None:
    rows, x = torch.cat([part.rows for part in results]), torch.cat([part.x for part in results])
    order = rows.sort(stable=True).indices
    same = rows[order][1:] == rows[order][:-1]
    pairs = x[order][1:][same], x[order][:-1][same]
    # A live model reads other rows beside it the second time, which may change the last bits.
    _require(torch.allclose(*pairs, rtol=1e-3, atol=1e-3), "give a row the same values again")


def _check_order(source: BatchSource, batch: int, seed: int) -> None:
    def first(number: int) -> list[int]:
        return next(source.batches(batch=batch, seed=number)).rows.tolist()

    _require(first(seed) == first(seed), "give the same order for the same seed")
    _require(first(seed) != first(seed + 1), "give another order for another seed")
    _require(sorted(first(seed)) != first(seed), "shuffle its rows")


def _check_resuming(source: BatchSource, batch: int, seed: int) -> None:
    rows = [part.rows.tolist() for part in source.batches(batch=batch, seed=seed, epochs=2)]
    for start in (1, len(rows) // 2, len(rows)):
        rest = source.batches(batch=batch, seed=seed, epochs=2, start=start)
        _require([p.rows.tolist() for p in rest] == rows[start:], f"go on from batch {start}")
        left = source.n_batches(batch=batch, epochs=2, start=start)
        _require(left == len(rows) - start, "count what is left")


def _check_hook_points(source: BatchSource, batch: int, seed: int) -> None:
    joined = next(source.batches(batch=batch, seed=seed)).x
    alone = [next(source.batches([name], batch=batch, seed=seed)).x for name in source.hook_points]
    side_by_side = torch.cat(alone, dim=1)
    same = joined.shape == side_by_side.shape
    same = same and torch.allclose(joined, side_by_side, rtol=1e-3, atol=1e-3)
    _require(same, "put hook points side by side in the order in which they are named")


def _check_refusals(source: BatchSource, batch: int, seed: int) -> None:
    n = len(source.rows(TRAINING_SPLITS))
    wrong = {
        "a batch of 0": lambda: source.batches(batch=0, seed=seed),
        "a batch above the rows": lambda: source.batches(batch=n + 1, seed=seed),
        "a start beyond the end": lambda: source.batches(batch=batch, seed=seed, start=n),
        "a negative start": lambda: source.batches(batch=batch, seed=seed, start=-1),
        "no epoch": lambda: source.batches(batch=batch, seed=seed, epochs=0),
    }
    for name, ask in wrong.items():
        try:
            next(iter(ask()), None)
        except ValueError:
            continue
        _require(False, f"refuse {name} with a ValueError")


def _check_early_end(source: BatchSource, batch: int, seed: int) -> None:
    before = threading.active_count()
    some = iter(source.batches(batch=batch, seed=seed))
    next(some)
    getattr(some, "close", lambda: None)()
    _require(threading.active_count() <= before, "end its threads with the iterator")


_LABELS = ("noun.animal", "noun.food", "verb.motion")


def synthetic_plan(  # noqa: PLR0913
    hook_points: Mapping[str, int],
    *,
    n_examples: int,
    context: int = 17,
    rows_per_shard: int = 61,
    dtype: Dtype = "bfloat16",
    compression: Compression = "none",
    n_labels: int = 3,
    seed: int = 0,
) -> Plan:
    """Describe a synthetic cache; one position of each example is skipped."""
    return Plan(
        made_from={"model": "linear", "seed": seed},
        hook_points=dict(hook_points),
        dtype=dtype,
        compression=compression,
        context=context,
        skip_positions=1,
        rows_per_shard=rows_per_shard,
        n_examples=n_examples,
        source_names=("prose", "glosses"),
        label_names=_LABELS[:n_labels],
    )


class LinearModel:
    """The seeded linear map, and the examples that it reads.

    Args:
        plan: What `synthetic_plan` gave.
        vocab: Number of different tokens.
    """

    def __init__(self, plan: Plan, *, vocab: int = 97) -> None:
        made = torch.Generator().manual_seed(int(plan.made_from["seed"]))
        n, shape = plan.n_examples, (plan.n_examples, plan.context)
        n_labels = len(plan.label_names)
        self.plan = plan
        self.examples = Examples(
            tokens=torch.randint(vocab, shape, generator=made),
            split=torch.arange(n) % 10 // 4 % len(SPLITS),
            source=torch.arange(n) % 2,
            source_names=plan.source_names,
            label=torch.randint(-1, n_labels, shape, generator=made) if n_labels else None,
            label_names=plan.label_names,
        )
        self._of_token = {
            name: torch.randn(vocab, d_model, generator=made) * 3 + 1
            for name, d_model in plan.hook_points.items()
        }
        self._of_position = {
            name: torch.randn(plan.context, d_model, generator=made)
            for name, d_model in plan.hook_points.items()
        }

    def __call__(self, numbers: range) -> dict[str, Float[Tensor, "example pos _"]]:
        """Return the activations of some examples by hook point."""
        tokens = self.examples.tokens[numbers.start : numbers.stop]
        return {
            name: table[tokens] + self._of_position[name] for name, table in self._of_token.items()
        }

    def shard(self, shard: int, *, examples_per_forward: int = 2) -> ShardBuffer:
        """Return a shard, filled."""
        buffer = ShardBuffer(self.plan, shard, self.examples)
        covered = self.plan.examples_of(shard)
        for start in covered[::examples_per_forward]:
            numbers = range(start, min(start + examples_per_forward, covered.stop))
            buffer.add(numbers, self(numbers))
        return buffer


def write_synthetic(path: Path, plan: Plan, *, rank: int = 0, n_ranks: int = 1) -> ActivationCache:
    """Write, or go on writing, a synthetic cache and open it."""
    model = LinearModel(plan)
    with CacheWriter(path, plan, rank=rank) as writer:
        for shard in writer.claims(n_ranks):
            writer.commit(model.shard(shard))
        writer.finish({"device": "cpu"})
    return open_cache(path)
