"""What the whole training loop costs beside a bare loop over TrainStep, at steps of about 5 ms.

    python -m benchmarks.bench_loop [--rounds 15] [--steps 400] [--record]

`bare` calls the step on rows in memory; `loop` is `sae.train.fit.train` as it is: rows are read
from a cache on disk, Lightning, figures to CSV and TensorBoard every 20 steps, signals, progress.
Both are timed from the end of the first step to the end of the last one, in turns; starting,
compiling and the checkpoint at the end are outside. The next rows are read by a thread of its own
beside the step; where no core is free for it, the clock and the process's CPU time have its work in
them, and on a machine that others use, theirs. The CPU time of the thread that trains has neither.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from activations_cache import ActivationCache
from activations_cache.testing import synthetic_plan, write_synthetic
from benchmarks.rows import append, surroundings
from sae.architecture import TopK
from sae.train.config import AuxK, DictionaryConfig, TrainConfig
from sae.train.fit import train
from sae.train.hook_points import sites
from sae.train.initialise import new_autoencoder
from sae.train.step import TrainStep

HOOK, D_IN, BATCH = "a:out", 128, 256
ENTRY = DictionaryConfig(d_sae=1152, activation=TopK(k=16), auxk=AuxK(), dead_after_tokens=10_000)
GOAL = 1.05
RATIOS = ("ratio_clock", "ratio_cpu", "ratio_main_thread")


class Time(NamedTuple):
    """Between the end of the first step and the end of the last."""

    clock: float
    """Seconds."""
    cpu: float
    """CPU seconds of the process, the thread that reads ahead among them."""
    main: float
    """CPU seconds of the thread that trains."""


def main() -> None:
    """Time both in turns, print and record their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--record", action="store_true", help="append to results/loop.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.rounds, arguments.steps)
    row = {"shape": {"batch": BATCH, "d_in": D_IN, "d_sae": ENTRY.d_sae}, **found}
    row |= {"rounds": arguments.rounds, "steps": arguments.steps, "goal": GOAL}
    ratios = (f"{name[6:]} {row[name]['median']:.3f}" for name in RATIOS)
    print(f"bare step {row['bare_step_cpu_ms']:.2f} ms of CPU; loop / bare: {', '.join(ratios)}")
    if arguments.record:
        append("loop", [{**row, **surroundings(("lightning",))}])


def measure(folder: Path, rounds: int, n_steps: int) -> dict:
    """Ratios of the rounds, each of a bare and a whole loop one after the other."""
    n_examples = -(-n_steps * BATCH * 10 // (8 * 16)) + 10  # 8 of 10 are trained on, 16 rows each
    plan = synthetic_plan({HOOK: D_IN}, n_examples=n_examples, rows_per_shard=65_536)
    cache = write_synthetic(folder / "cache", plan)
    config = TrainConfig(saes={"topk": ENTRY}, batch=BATCH, precision="fp32")
    rows = [batch.x for batch in cache.batches((HOOK,), batch=BATCH, seed=0)]
    pairs = []
    for n in range(rounds + 1):  # the first one warms up
        both = [lambda: bare(cache, rows), lambda n=n: whole(cache, config, folder / str(n))]
        times = [one() for one in both[:: 1 if n % 2 else -1]]
        pairs.append(times if n % 2 else times[::-1])
    pairs = pairs[1:]
    return {
        "bare_step_ms": 1e3 * min(one.clock for one, _ in pairs) / (len(rows) - 1),
        "bare_step_cpu_ms": 1e3 * min(one.cpu for one, _ in pairs) / (len(rows) - 1),
        "ratio_clock": _spread([loop.clock / one.clock for one, loop in pairs]),
        "ratio_cpu": _spread([loop.cpu / one.cpu for one, loop in pairs]),
        "ratio_main_thread": _spread([loop.main / one.main for one, loop in pairs]),
        "ratio_of_fastest": min(loop.clock for _, loop in pairs)
        / min(one.clock for one, _ in pairs),
    }


def bare(cache: ActivationCache, rows: list[torch.Tensor]) -> Time:
    """The step alone, on rows in memory."""
    where = sites({"topk": ENTRY}, cache.hook_points)["topk"]
    step = TrainStep(new_autoencoder(cache, where, ENTRY, 0), ENTRY, len(rows))
    ends = []
    for x in rows:
        step(x)
        ends.append(_now())
    return _between(ends)


def whole(cache: ActivationCache, config: TrainConfig, path: Path) -> Time:
    """Everything that `sae train` does between two steps."""
    ends = []
    train(cache, config, path, progress=lambda done, total, unit: ends.append(_now()))  # noqa: ARG005
    return _between(ends)


def _now() -> Time:
    return Time(time.perf_counter(), time.process_time(), time.thread_time())


def _between(ends: list[Time]) -> Time:
    first, last = ends[0], ends[-1]
    return Time(*(end - begin for begin, end in zip(first, last, strict=True)))


def _spread(ratios: list[float]) -> dict[str, float]:
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


if __name__ == "__main__":
    main()
