"""Reading a cache much larger than the memory that is allowed: only what is used is held."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from activations_cache import io
from activations_cache.journal import seal, unseal
from activations_cache.layout import layout_of
from activations_cache.testing import synthetic_plan, write_synthetic

READ = """
import resource, sys
import torch
import activations_cache

def anonymous() -> int:
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

cache = activations_cache.open(sys.argv[1])
torch.ones(8) + 1
base = anonymous()
used = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + (512 << 20),) * 2)
n_bytes, most = 0, 0
if sys.argv[2] == "batches":
    for batch in cache.batches(batch=8192, seed=0, splits=("explain", "score", "hold")):
        n_bytes += batch.x.numel() * 2
        most = max(most, anonymous() - base)
else:
    everything = cache["a.1:out"][cache.rows()]
print(n_bytes, most)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 5 GiB whose shards of 32 MiB are one file under many names."""
    path = tmp_path_factory.mktemp("large") / "cache"
    per_shard, d_model, n_shards = 16384, 1024, 160
    plan = synthetic_plan(
        {"a.1:out": d_model}, n_examples=n_shards * (per_shard // 256), context=257,
        rows_per_shard=per_shard, n_labels=0,
    )  # fmt: skip
    assert plan.n_shards == n_shards
    one = synthetic_plan(
        {"a.1:out": d_model}, n_examples=per_shard // 256, context=257, rows_per_shard=per_shard,
        n_labels=0,
    )  # fmt: skip
    write_synthetic(path, one)
    repeat_first_shard(path, plan)
    return path


def repeat_first_shard(path: Path, plan) -> None:
    """Make a cache of one shard one of many, by hard links; examples keep their numbers."""
    import dataclasses

    import numpy as np

    from activations_cache.journal import journals_at, newest
    from activations_cache.manifest import write_plan
    from activations_cache.writer import finish

    (record,) = newest(journals_at(path)).values()
    (path / "manifest.json").unlink()
    write_plan(path, plan)
    lines, layout = [], layout_of(plan)
    for shard in range(plan.n_shards):
        files = {}
        for spec in layout.per_shard():
            first, here = path / spec.file(0), path / spec.file(shard)
            here.parent.mkdir(parents=True, exist_ok=True)
            if spec.path == "rows/example":
                numbers = np.fromfile(first, spec.numpy) + shard * plan.examples_per_shard
                here = here if shard else first
                if shard:
                    here.write_bytes(numbers.tobytes())
                    files[spec.file(shard)] = io.describe(numbers)
                    continue
            elif shard:
                os.link(first, here)
            files[spec.file(shard)] = record.files[spec.file(0)]
        lines.append(
            seal(dataclasses.asdict(dataclasses.replace(record, shard=shard, files=files)))
        )
    (journal,) = journals_at(path)
    assert unseal(journal.read_bytes(), "journal")
    journal.write_bytes(b"".join(lines))
    finish(path, plan, {})


def read(path: Path, how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", READ, str(path), how], capture_output=True, text=True, check=False
    )


@pytest.mark.long
@pytest.mark.timeout(900)
def test_five_gibibytes_are_read_within_half_a_gibibyte(large: Path, figure):
    done = read(large, "batches")
    assert done.returncode == 0, done.stderr
    n_bytes, most = map(int, done.stdout.split())
    assert n_bytes == 5 << 30
    assert most <= 150 << 20
    figure("R10", f"5 GiB read with {most >> 20} MiB more memory")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_reading_everything_at_once_does_not_fit(large: Path):
    done = read(large, "everything")
    assert done.returncode != 0
    assert "memory" in done.stderr.lower()
