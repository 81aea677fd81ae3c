"""What a whole run takes: seconds by the clock and of the processor, for each step.

`sae bench run demo --times 3`. Each time, `sae run NAME` starts as a command in an empty directory.
Its cache, and every step after it, is made anew. Nothing is installed or downloaded.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.rows import append, surroundings
from sae.config import config_file, load
from sae.run.config import RunConfig
from sae.run.costs import estimate_time
from sae.run.pipeline import MARKER, STEPS

POLL_SECONDS = 0.2
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Run the recipe several times, print each time and append a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="demo", help="a recipe's name or a file")
    parser.add_argument("--times", type=int, default=3, help="how often; medians are recorded")
    parser.add_argument("--record", action="store_true", help="append to results/run.jsonl")
    options = parser.parse_args()
    runs = []
    for turn in range(1, options.times + 1):
        runs.append(one_run(options.recipe))
        print(f"{turn} of {options.times}:", line(runs[-1]), flush=True)
    median = {
        kind: {
            name: round(statistics.median(run[kind][name] for run in runs), 1)
            for name in runs[0][kind]
        }
        for kind in ("seconds", "cpu_seconds")
    }
    rates = [run["gflops_per_second"] for run in runs]
    row = surroundings(("transformers", "lightning", "zarr")) | {
        "recipe": options.recipe,
        "times": options.times,
        **median,
        "gflops_per_second": [round(rate) for rate in rates],
        "load": [run["load"] for run in runs],
    }
    print("median:", line(median))
    if options.record:
        print(append("run", [row]))


def one_run(recipe: str) -> dict[str, Any]:
    """Run a recipe in an empty directory.

    Returns:
        `seconds` and `cpu_seconds` of each step and of the whole command, its start included; what
        the machine's product gave before; the machine's load average before.
    """
    load_average = round(os.getloadavg()[0], 2)
    expected = estimate_time(load(RunConfig, config_file(recipe)))
    rate = 0.0 if expected is None else expected.flops_per_second / 1e9
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "run"
        overrides = [f"output={output}", f"cache_path={output}/cache"]
        command = [sys.executable, "-m", "sae.cli", "run", recipe, *overrides]
        began = time.perf_counter()
        with (Path(directory) / "log").open("w") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log)
            marks = watch(child, output, began)
        if child.returncode:
            sys.exit((Path(directory) / "log").read_text()[-2000:])
    seconds, cpu = {}, {}
    before = (0.0, 0.0)
    for name, mark in marks.items():
        seconds[name], cpu[name] = mark[0] - before[0], mark[1] - before[1]
        before = mark
    seconds["all"], cpu["all"] = marks["end"]
    return {"seconds": seconds, "cpu_seconds": cpu, "gflops_per_second": rate, "load": load_average}


def watch(
    child: "subprocess.Popen[bytes]", output: Path, began: float
) -> dict[str, tuple[float, float]]:
    """Wait for a run; return clock and processor seconds at the end of each step and of all."""
    marks: dict[str, tuple[float, float]] = {}
    now = (0.0, 0.0)
    while child.poll() is None:
        now = (time.perf_counter() - began, cpu_seconds(child.pid) or now[1])
        for step in STEPS:
            if step.name not in marks and (output / step.name / MARKER).is_file():
                marks[step.name] = now
        time.sleep(POLL_SECONDS)
    marks["end"] = (time.perf_counter() - began, now[1])
    return marks


def cpu_seconds(pid: int) -> float:
    """Processor seconds of a process and of its children that ended; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return sum(int(field) for field in fields[11:15]) / TICKS


def line(run: dict[str, Any]) -> str:
    """One line for people: each step by the clock and, in brackets, of the processor."""
    return ", ".join(
        f"{name} {seconds:.0f} s ({run['cpu_seconds'][name]:.0f})"
        for name, seconds in run["seconds"].items()
    )


if __name__ == "__main__":
    main()
