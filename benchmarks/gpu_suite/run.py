"""Goes through the cases: the gate first, then the time, a row for every candidate."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from triton.errors import TritonError

from benchmarks.gpu_suite import ops, report, steps, timing
from benchmarks.gpu_suite.case import Case, Shape, Variant, gate

SHAPES = (
    Shape(768, 24576, 32),
    Shape(768, 131072, 32),
    Shape(2304, 65536, 64),
    Shape(4096, 131072, 64),
)
SECONDS = 0.3
FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, TritonError)
"""What a candidate may die of without ending the suite: it is reported as failed and not timed.

Out of memory is a RuntimeError; torch raises NotImplementedError for dtypes that an op lacks.
"""

Measure = Callable[[Sequence[Callable[[], Any]], float, bool], timing.Quantiles]


class Suite:
    """The cases in turn, until the time is over."""

    def __init__(
        self,
        writer: report.RowWriter,
        top: timing.DevicePeaks,
        deadline: float,
        only: str = "",
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        measure: Measure = timing.measure,
    ) -> None:
        self.writer, self.top, self.deadline, self.only = writer, top, deadline, only
        self.device, self.dtype, self.measure = device, dtype, measure

    def run(self, shapes: Sequence[Shape]) -> None:
        """Steps first, since they are what the ops are for."""
        for shape in shapes:
            for name in steps.STEPS:
                self._step(shape, name)
        for shape in shapes:
            for case in self._cases(shape):
                for name, candidate in case.candidates.items():
                    self._candidate(case, name, candidate)

    def _cases(self, shape: Shape) -> Iterator[Case]:
        yield from ops.all_ops(shape, self.dtype, self.device)
        yield steps.adam(shape, self.device, unit=True)
        yield steps.adam(shape, self.device, unit=False)

    def _guarded(self, row: report.Row, work: Callable[[report.Row], report.Row]) -> None:
        """Write the row that `work` completes, or one that says why there is none."""
        if self.only not in row["op"]:
            return
        if time.monotonic() > self.deadline:
            self.writer.add(row | {"status": "skipped: the time was over"})
            return
        try:
            done = work(row)
        except FAILURES as failure:
            reason = f"{type(failure).__name__}: {failure}".split("\n")[0][:200]
            done = row | {"status": f"failed: {reason}"}
        if self.device == "cuda":
            torch.cuda.empty_cache()
        self.writer.add(done)

    def _candidate(self, case: Case, name: str, candidate: Variant) -> None:
        row = report.named(case.op, case.shape, case.dtype, name, case.pattern)
        self._guarded(row, partial(self._time_candidate, case, candidate))

    def _time_candidate(self, case: Case, candidate: Variant, row: report.Row) -> report.Row:
        error = gate(case, candidate)
        row |= {"error": error, "tolerance": candidate.tolerance}
        if not error <= candidate.tolerance:
            return row | {"status": f"wrong: error {error:.1e} above {candidate.tolerance:.1e}"}
        first = case.make(0)
        n_sets = timing.n_sets(sum(tensor.nbytes for tensor in first))
        inputs = [first, *(case.make(seed) for seed in range(1, n_sets))]
        with self._peak(row):
            times = self.measure(
                [partial(candidate.run, *given) for given in inputs], SECONDS, True
            )
        return report.timed(row | {"sets": n_sets}, times, case.n_bytes, case.flops, self.top)

    def _step(self, shape: Shape, name: str) -> None:
        row = report.named("step", shape, self.dtype, name)
        self._guarded(row, partial(self._time_step, shape, name))
        if self.device == "cuda":
            row = report.named("step, CUDA graph", shape, self.dtype, name)
            self._guarded(row, partial(self._time_step, shape, name, graph=True))

    def _time_step(
        self, shape: Shape, name: str, row: report.Row, graph: bool = False
    ) -> report.Row:
        error = steps.step_error(shape, self.dtype, self.device, name)
        row |= {"error": error, "tolerance": 2e-2}
        if not error <= row["tolerance"]:
            return row | {"status": f"wrong: error {error:.1e} above {row['tolerance']:.1e}"}
        step = steps.STEPS[name](shape, self.dtype, self.device)
        x = ops.Draw(1, self.device).normal(shape.batch, shape.d_model, dtype=self.dtype)
        with self._peak(row):
            call = timing.capture(partial(step, x)) if graph else partial(step, x)
            times = self.measure([call], SECONDS, graph)  # eager: with the host's part
        return report.timed(
            row, times, steps.step_bytes(shape), steps.step_flops(shape), self.top
        ) | {
            "bound_ms": self._step_bound(shape),
            "share_of_bound": self._step_bound(shape) / times.median,
        }

    def _step_bound(self, shape: Shape) -> float:
        """The product and the optimiser one after the other: a step cannot overlap them."""
        product = report.bound_ms(0, steps.step_flops(shape), self.top)
        return product + report.bound_ms(steps.step_bytes(shape), 0, self.top)

    def _peak(self, row: report.Row) -> "_Peak":
        return _Peak(row, self.device)


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
