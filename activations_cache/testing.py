"""What every source of batches must do; `check_batch_source` is the conformance suite.

A cache on disk and a live model pass it; so must anything else that is to take their place.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from activations_cache.batches import Batch
from activations_cache.config import SPLITS, TRAINING_SPLITS


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
    together = torch.cat(parts).sort().values
    _require(torch.equal(together, every), "put each row into exactly one split")


def _check_coverage(source: BatchSource, batch: int, seed: int) -> None:
    wanted = source.rows(TRAINING_SPLITS)
    epochs, n = 2, len(source.rows(TRAINING_SPLITS))
    found = list(source.batches(batch=batch, seed=seed, epochs=epochs))
    n_batches = source.n_batches(batch=batch, epochs=epochs)
    _require(len(found) == n_batches == epochs * n // batch, "give as many batches as it says")
    for part in found:
        _require(part.x.shape[0] == len(part.rows) == batch, "give whole batches alone")
        _require(part.x.dtype == torch.float32, "give float32")
        _require(bool(part.x.isfinite().all()), "give finite numbers")
    rows = torch.cat([part.rows for part in found])
    _require(torch.equal(rows[:n].sort().values, wanted), "give each row exactly once per epoch")
    again = rows[n:].unique()
    _require(len(again) == len(rows) - n, "give no row twice in the second epoch")
    _require(not torch.equal(rows[:batch], rows[n : n + batch]), "shuffle each epoch anew")
    _check_values(found)


def _check_values(found: list[Batch]) -> None:
    rows, x = torch.cat([part.rows for part in found]), torch.cat([part.x for part in found])
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
    together = next(source.batches(batch=batch, seed=seed)).x
    alone = [next(source.batches([name], batch=batch, seed=seed)).x for name in source.hook_points]
    side_by_side = torch.cat(alone, dim=1)
    same = together.shape == side_by_side.shape
    same = same and torch.allclose(together, side_by_side, rtol=1e-3, atol=1e-3)
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
