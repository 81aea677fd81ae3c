"""The LightningDataModule: batches of a cache, in an order that needs no state to go on.

What each dictionary gets of rows in which several hook points stand side by side.
"""

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import lightning
import torch
from jaxtyping import Float
from torch import Tensor

from activations_cache.summary import looked_at
from monosema.checks import at_least
from sae.train.hook_points import HookPoints
from sae.train.ranks import Axis

if TYPE_CHECKING:
    from activations_cache import ActivationCache, ActivationStream
    from activations_cache.batches import Batch
    from sae.train.throughput import Meter


class Columns(NamedTuple):
    """The columns that one dictionary reads, and those that it predicts."""

    inputs: tuple[slice, ...]
    """One for each hook point that is read."""
    outputs: tuple[slice, ...]
    """One for each that is predicted; empty where these are the inputs."""

    def pick(self, x: Float[Tensor, "batch width"]) -> tuple[Float[Tensor, "batch _"], ...]:
        """The rows that are read and, where they are others, those that are predicted."""
        parts = (self.inputs, self.outputs) if self.outputs else (self.inputs,)
        return tuple(_beside(x, columns) for columns in parts)


class Reads(NamedTuple):
    """What is read of the cache, and what of it is whose."""

    hook_points: tuple[str, ...]
    """Those that any dictionary needs, side by side in the order of the cache."""
    columns: dict[str, Columns]
    """By dictionary."""


def reads(where: Mapping[str, HookPoints], widths: Mapping[str, int]) -> Reads:
    """Lay out the hook points of all dictionaries; `widths` are the cache's, in its order."""
    needed = {point for of in where.values() for point in (*of.inputs, *of.outputs)}
    found: dict[str, slice] = {}
    start = 0
    for point in (point for point in widths if point in needed):
        found[point] = slice(start, start + widths[point])
        start += widths[point]
    columns = {
        name: Columns(*(tuple(found[point] for point in points) for points in of))
        for name, of in where.items()
    }
    return Reads(tuple(found), columns)


def _beside(x: Float[Tensor, "batch width"], columns: Sequence[slice]) -> Float[Tensor, "batch _"]:
    """The columns in memory of their own, as they are in rows that hold nothing else."""
    if len(columns) == 1:
        return x[:, columns[0]].contiguous()
    return torch.cat([x[:, part] for part in columns], dim=1)


AHEAD = 2
"""Batches that are on the device or on their way while a step runs."""

OnItsWay = tuple[Tensor, Callable[[], None]]
"""A batch on the device, and what to call before it is read."""


def copies_to(device: torch.device) -> Callable[[Tensor], OnItsWay]:
    """Copies to a GPU on a stream of their own, from pinned memory; the step's stream waits."""
    stream = torch.cuda.Stream(device)

    def begin(x: Tensor) -> OnItsWay:
        with torch.cuda.stream(stream):
            there = x.to(device, non_blocking=True)
            done = stream.record_event()

        def ready() -> None:
            now = torch.cuda.current_stream(device)
            now.wait_event(done)
            there.record_stream(now)  # or its memory would be given away while the step reads it

        return there, ready

    return begin


def ahead(batches: Iterator[Tensor], begin: Callable[[Tensor], OnItsWay]) -> Iterator[Tensor]:
    """The batches on the device; the next one is fetched when the step before it is launched."""
    coming = deque(map(begin, itertools.islice(batches, AHEAD)))
    while coming:
        x, ready = coming.popleft()
        ready()
        yield x
        coming.extend(map(begin, itertools.islice(batches, 1)))


class TrainingRows:
    """What Lightning takes for a DataLoader: tensors (batch, width) of a cache or a stream.

    The batch with a number is the same in every run, so `next` is all that a resumed run needs.
    Each pass of the Trainer goes on where the one before it ended.
    """

    def __init__(self, source: "ActivationCache | ActivationStream", data: "ActivationDataModule"):
        """Take where rows come from, and the data module that says in which order."""
        self.source, self.data = source, data
        self.next = 0
        """Number of the next batch, counted over all epochs."""
        self.part = slice(None)
        """The rows of each batch that are this process's."""
        self.hook_points = data.hook_points
        self.as_stored = False
        """Whether rows come in the cache's number format, to be made float32 where they go."""
        self.n_passes = 1
        """Passes that are to come, as far as that is known."""
        self.meter: Meter | None = None
        self._open: Generator[Batch] | None = None
        self._at = self._end = 0

    @property
    def n_batches(self) -> int:
        """Batches in a pass of the Trainer, which is `epochs` of the rows, or its beginning."""
        n, n_rows = (
            self.source.n_batches(batch=self.data.batch, epochs=self.data.epochs),
            self.data.n_rows,
        )
        return n if n_rows is None else min(n, n_rows // self.data.batch)

    def __len__(self) -> int:
        """What Lightning takes in a pass."""
        return math.ceil(self.n_batches / self.data.steps_per_turn)

    def __iter__(self) -> Iterator[Tensor | Iterator[Tensor]]:
        """Yield the batches of a pass, or several at a time as an iterator."""
        batches, at_once = self._from_here(), self.data.steps_per_turn
        if at_once == 1:
            yield from batches
            return
        for _ in range(len(self)):
            yield itertools.islice(batches, at_once)

    def close(self) -> None:
        """End the thread that reads ahead, or a model goes on running for nobody."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def state_dict(self) -> dict[str, int]:
        """Where a checkpoint of Lightning goes on."""
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on there."""
        self.next = state["next"]

    def _from_here(self) -> Generator[Tensor]:
        for _ in range(self.n_batches):
            with contextlib.nullcontext() if self.meter is None else self.meter.timed():
                batch = next(self._opened(), None)
            if batch is None:
                return
            self.next = self._at = self.next + 1
            yield batch.x

    def _opened(self) -> "Generator[Batch]":
        """The batches from `next` on: those that are open, if they stand there."""
        if self._open is None or self._at != self.next or self.next >= self._end:
            self.close()
            data = self.data
            epochs = data.epochs * max(self.n_passes, self.next // self.n_batches + 1)
            self._end = self.source.n_batches(batch=data.batch, epochs=epochs)
            self._open = self.source.batches(
                self.hook_points,
                batch=data.batch,
                seed=data.seed,
                start=self.next,
                epochs=epochs,
                part=self.part,
                as_stored=self.as_stored,
            )
            self._at = self.next
        return self._open


class ActivationDataModule(lightning.LightningDataModule):
    """Rows of a cache for a Trainer: `trainer.fit(SAEModule(saes), ActivationDataModule(cache))`.

    The order is that of `sae train`. Each process of a Trainer gets its own part of every batch.
    """

    def __init__(  # noqa: PLR0913
        self,
        cache: "ActivationCache | str | Path",
        *,
        batch: int = 1024,
        seed: int = 0,
        epochs: int = 1,
        hook_points: Sequence[str] = (),
        max_norm: float | None = 10.0,
        source: "ActivationStream | None" = None,
        steps_per_turn: int = 1,
        n_rows: int | None = None,
    ) -> None:
        """Take a cache, or the path of one.

        Args:
            cache: Says what rows there are; dictionaries begin with its statistics.
            batch: Rows per step, over all processes.
            seed: Decides the order of the rows.
            epochs: Passes over the rows without a seam, which the Trainer takes for one epoch.
            hook_points: Those that are read; the cache's when empty.
            max_norm: Rows larger than so many times the median norm are left out; None keeps all.
            source: Gives the rows in the cache's place.
            steps_per_turn: Steps for which Lightning does its own work once. More than 1 is for
                steps that are as short as this work: counters of batches then count turns.
            n_rows: A pass ends after so many rows; the whole order when None.
        """
        super().__init__()
        if isinstance(cache, (str, Path)):
            from activations_cache import open as open_cache

            cache = open_cache(cache)
        for name, value in (
            ("batch", batch),
            ("epochs", epochs),
            ("steps_per_turn", steps_per_turn),
        ):
            at_least(name, value, 1)
        if n_rows is not None:
            at_least("n_rows", n_rows, batch)
        for point in hook_points:
            cache.d_model(point)  # which refuses a name that it has not
        self.hook_points = tuple(
            p for p in cache.hook_points if p in hook_points or not hook_points
        )
        self.cache = looked_at(cache, self.hook_points, max_norm)
        self.batch, self.seed, self.epochs, self.max_norm = batch, seed, epochs, max_norm
        self.steps_per_turn, self.n_rows = steps_per_turn, n_rows
        self.rows = TrainingRows(source or self.cache, self)

    def setup(self, stage: str) -> None:
        """Give this process its part of every batch, and see how long the Trainer goes on."""
        del stage
        if self.trainer is not None:
            axis = Axis(None, self.trainer.global_rank, self.trainer.world_size)
            if axis.size > 1:  # or the part is that of processes which the Trainer does not know
                self.rows.part = axis.share(self.batch)
            self.rows.n_passes = max(self.trainer.max_epochs or 1, 1)

    def train_dataloader(self) -> TrainingRows:
        """The rows, in the order of the seed."""
        return self.rows

    def on_exception(self, exception: BaseException) -> None:
        """Read no further."""
        del exception
        self.rows.close()

    def teardown(self, stage: str) -> None:
        """Read no further."""
        del stage
        self.rows.close()
