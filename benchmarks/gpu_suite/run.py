"""Goes through the rows: checks first, then steps, the loop, the ops, and what could be tuned."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from triton.errors import TritonError

from benchmarks.gpu_suite import bare, checks, loop, ops, report, steps, timing, tuning
from benchmarks.gpu_suite.case import Case, Shape, Variant, gate

SHAPES = (
    Shape(768, 24576, 32),
    Shape(768, 131072, 32),
    Shape(2304, 65536, 64),
    Shape(4096, 131072, 64),
)
GOALS_MS = dict(zip(SHAPES, (0.7, 3.75, 6.0, 21.2), strict=True))
"""Milliseconds of a step on an H200 by arithmetic alone; goals are multiples of these."""
OTHER_STEPS = {"step, jumprelu": Shape(2304, 65536, 64), "step, default": Shape(768, 4096, 25)}
SMALL = Shape(13, 16, 2, 3)
SECONDS = 0.3
FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, TritonError)
"""What a candidate may die of without ending the suite: it is reported as failed and not timed.

Out of memory is a RuntimeError, and so is what torch raises for dtypes that an op lacks.
"""

Measure = Callable[[Sequence[Callable[[], Any]], float, bool], timing.Quantiles]


class DeviceLostError(SystemExit):
    """After an illegal access nothing works in this process any more; another one goes on."""


class RowTaker(Protocol):
    """Who takes the rows."""

    def begin(self, row: report.Row) -> None:
        """Take what a row is about, before it is worked on."""
        ...

    def add(self, row: report.Row) -> None:
        """Take a row that is done."""
        ...


class Work(NamedTuple):
    """What a row is about, and what completes it."""

    row: report.Row
    do: Callable[[report.Row], report.Row]


class Suite:
    """The rows in turn, until the time is over."""

    def __init__(
        self,
        writer: RowTaker,
        top: timing.DevicePeaks,
        deadline: float,
        only: str = "",
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        measure: Measure = timing.measure,
    ) -> None:
        self.writer, self.top, self.deadline, self.only = writer, top, deadline, only
        self.device, self.dtype, self.measure = device, dtype, measure

    def run(self, shapes: Sequence[Shape], start: int = 0) -> None:
        """Do all rows from this number on."""
        for number, work in enumerate(self.works(shapes)):
            if number >= start:
                self._guarded(work)

    def works(self, shapes: Sequence[Shape]) -> Iterator[Work]:
        """What is to be done, in its order; whatever has another name than `only` is left out."""
        return (work for work in self._works(shapes) if self.only in work.row["op"])

    def _works(self, shapes: Sequence[Shape]) -> Iterator[Work]:
        real = shapes == SHAPES
        for name, check in checks.CHECKS.items():
            row = report.named("check", SMALL, torch.float32, name)
            yield Work(row, partial(self._check, check))
        for shape in shapes:
            yield from self._steps("step", shape)
        for op, shape in OTHER_STEPS.items():
            yield from self._steps(op, shape if real else shapes[0])
        row = report.named("loop from a cache", shapes[0], self.dtype, "sae.train.train")
        yield Work(row, partial(self._loop, shapes[0]))
        for shape in shapes:
            for case in self._cases(shape):
                for name, candidate in case.candidates.items():
                    row = report.named(case.op, shape, case.dtype, name, case.pattern)
                    yield Work(row, partial(self._time_candidate, case, candidate))
        for shape in shapes:
            for case in self._cases(shape):
                changes = tuning.changes(case)
                for change in changes if real else itertools.islice(changes, 1):
                    row = report.named(f"tuning: {case.op}", shape, case.dtype, change.name)
                    yield Work(row, partial(self._tune, case, change))

    def _cases(self, shape: Shape) -> Iterator[Case]:
        yield from ops.all_ops(shape, self.dtype, self.device)
        yield steps.adam(shape, self.device, unit=True)
        yield steps.adam(shape, self.device, unit=False)

    def _steps(self, op: str, shape: Shape) -> Iterator[Work]:
        for name in steps.STEPS[op]:
            row = report.named(op, shape, self.dtype, name)
            yield Work(row, partial(self._time_step, op, shape, name))

    def _guarded(self, work: Work) -> None:
        """Write the row that the work completes, or one that says why there is none."""
        if time.monotonic() > self.deadline:
            self.writer.add(work.row | {"status": "skipped: the time was over"})
            return
        self.writer.begin(work.row)
        began = time.monotonic()
        try:
            done = work.do(work.row)
            self._settle()
        except FAILURES as failure:
            reason = f"{type(failure).__name__}: {failure}".split("\n")[0][:200]
            done = work.row | {"status": f"failed: {reason}"}
        self.writer.add(done | {"seconds": time.monotonic() - began})
        try:
            self._settle()
        except RuntimeError as failure:
            raise DeviceLostError(LOST) from failure

    def _settle(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _check(self, check: checks.Check, row: report.Row) -> report.Row:
        try:
            return row | {"status": check(torch.device(self.device)) or "ok"}
        except AssertionError as wrong:
            return row | {"status": f"wrong: {wrong}".split("\n")[0][:200]}

    def _loop(self, shape: Shape, row: report.Row) -> report.Row:
        missing = loop.missing()
        if missing:
            return row | {"status": f"not run: {missing} is missing"}
        precision = "fp32" if self.dtype == torch.float32 else "bf16"
        with bare.on_cpu():
            seconds = loop.seconds_per_step(shape, precision)
        times = timing.Quantiles(1e3 * seconds, 1e3 * seconds, 1e3 * seconds, 1)
        return self._of_step(report.timed(row, times, 0, 0, self.top), shape, times)

    def _tune(self, case: Case, change: tuning.Change, row: report.Row) -> report.Row:
        with change.made():
            return self._time_candidate(case, case.candidates[tuning.RULES[case.op][1]], row)

    def _time_candidate(self, case: Case, candidate: Variant, row: report.Row) -> report.Row:
        error = gate(case, candidate)
        row = row | {"error": error, "tolerance": candidate.tolerance}
        if not error <= candidate.tolerance:
            return row | {"status": f"wrong: error {error:.1e} above {candidate.tolerance:.1e}"}
        first = case.make(0)
        n_sets = timing.n_sets(sum(tensor.nbytes for tensor in first))
        inputs = [first, *(case.make(seed) for seed in range(1, n_sets))]
        with _Peak(row, self.device):
            times = self.measure(
                [partial(candidate.run, *given) for given in inputs], SECONDS, True
            )
        return report.timed(row | {"sets": n_sets}, times, case.n_bytes, case.flops, self.top)

    def _time_step(self, op: str, shape: Shape, name: str, row: report.Row) -> report.Row:
        step = steps.STEPS[op][name](shape, self.dtype, self.device)
        error = steps.step_error(op, step, shape, self.dtype, self.device)
        row = row | {"error": error, "tolerance": 2e-2}
        if not error <= row["tolerance"]:
            return row | {"status": f"wrong: error {error:.1e} above {row['tolerance']:.1e}"}
        x = ops.Draw(1, self.device).normal(shape.batch, shape.d_model, dtype=self.dtype)
        with _Peak(row, self.device):
            times = self.measure([partial(step, x)], SECONDS, False)  # with the host's part
        work = steps.step_bytes(shape), steps.step_flops(shape)
        return self._of_step(report.timed(row, times, *work, self.top), shape, times)

    def _of_step(self, row: report.Row, shape: Shape, times: timing.Quantiles) -> report.Row:
        """Add the floor: the product and the optimiser, which a step cannot overlap."""
        bound = report.bound_ms(0, steps.step_flops(shape), self.top)
        bound += report.bound_ms(steps.step_bytes(shape), 0, self.top)
        goal = GOALS_MS.get(shape)
        return row | {
            "bound_ms": bound,
            "share_of_bound": bound / times.median,
            "rows_per_s": 1e3 * shape.batch / times.median,
            "times_goal": None if goal is None else times.median / goal,
        }


LOST = 3
"""How a process ends whose device is lost."""


class _Peak:
    """Notes the most memory that was allocated at a time."""

    def __init__(self, row: report.Row, device: str) -> None:
        self.row, self.device = row, device

    def __enter__(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            self.row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
