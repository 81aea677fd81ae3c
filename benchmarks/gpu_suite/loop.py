"""The whole training loop from a cache on this machine's disk, where its packages are installed."""

import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from benchmarks.gpu_suite.case import Shape

PACKAGES = ("lightning", "zarr", "google_crc32c", "pydantic", "yaml", "tensorboard")
STEPS, TIMED = 48, 32
"""Steps of the run, and the last ones of them, which are timed."""
HOOK = "a:out"


def missing() -> str | None:
    """The first package that the loop needs and that is not there."""
    return next((name for name in PACKAGES if find_spec(name) is None), None)


def seconds_per_step(s: Shape, precision: Literal["fp32", "bf16"]) -> float:
    """Write a cache, train on it as `sae train` does, and time the last steps by the clock."""
    import torch

    from activations_cache.testing import synthetic_plan, write_synthetic
    from sae.architecture import TopK
    from sae.train.config import Adam, DictionaryConfig, TrainConfig
    from sae.train.fit import train

    context = 65
    n_examples = -(-10 * STEPS * s.batch // (8 * (context - 1))) + 10  # 8 of 10 are trained on
    entry = DictionaryConfig(d_sae=s.d_sae, activation=TopK(k=s.k), optimizer=Adam(lr=1e-3))
    config = TrainConfig(saes={"topk": entry}, batch=s.batch, precision=precision, log_every=STEPS)
    ends: list[float] = []

    def note(done: int, total: int, unit: str) -> None:
        del total, unit
        if done == (STEPS - TIMED) * s.batch or done == STEPS * s.batch:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        plan = synthetic_plan(
            {HOOK: s.d_model}, n_examples=n_examples, context=context, rows_per_shard=1 << 16
        )
        cache = write_synthetic(Path(folder) / "cache", plan)
        train(cache, config, Path(folder) / "run", n_rows=STEPS * s.batch, progress=note)
    return (ends[-1] - ends[0]) / TIMED
