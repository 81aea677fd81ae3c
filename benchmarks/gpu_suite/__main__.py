"""`python -m benchmarks.gpu_suite --minutes 8 --out DIR`; `--smoke`: small, on any machine.

The rows are made in a process of its own. Where that dies (an illegal access, no memory, a launch
that never ends), the row that it was at is lost, and another process goes on with the next one.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_suite import bare

ROW_SECONDS = 150.0
"""What a row may take, compiling included."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="stop to start rows after it")
    parser.add_argument("--out", type=Path, required=True, help="directory for the JSON lines")
    parser.add_argument("--only", default="", help="part of an op's name")
    parser.add_argument("--commit", help="for a tree without git")
    parser.add_argument("--smoke", action="store_true", help="small and once, on a CPU if need be")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


class LineWriter:
    """Tells the process that waits for rows of each, when it begins and when it is done."""

    def begin(self, row: dict[str, Any]) -> None:
        """Say what the next row is about."""
        print(json.dumps(row), flush=True)

    def add(self, row: dict[str, Any]) -> None:
        """Say that a row is done."""
        print(json.dumps(row), flush=True)


def work(given: argparse.Namespace) -> None:
    """Make rows from a number on, for the process that started this one."""
    spec = json.loads(given.work)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        bare.interpret()
    from benchmarks.gpu_suite import report, run, timing

    top = timing.DevicePeaks(*spec["top"]) if spec["top"] else timing.ceilings(0.5 if on_gpu else 0)
    common = report.surroundings(given.commit) | {
        "ceiling_bytes_per_s": top.bandwidth,
        "ceiling_flops_per_s": top.arithmetic,
    }
    common |= {"smoke": True} if given.smoke else {}
    print(json.dumps({"common": common, "top": list(top)}), flush=True)
    how: dict[str, Any] = {} if on_gpu else {"device": "cpu", "dtype": torch.float32}
    how |= {"measure": timing.once} if given.smoke else {}
    suite = run.Suite(LineWriter(), top, spec["deadline"], given.only, **how)
    suite.run([run.SMALL] if given.smoke else run.SHAPES, spec["start"])


def supervise(command: list[str], writer: Any, deadline: float, seconds: float) -> None:
    """Start processes until all rows are there, or one dies before its first row.

    Args:
        command: What makes rows, but for the number at which it starts.
        writer: Gets them.
        deadline: When no row is started any more, by the monotonic clock.
        seconds: What a row may take.
    """
    start, top, environment = 0, [], os.environ | {"PYTHONUNBUFFERED": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    while True:
        spec = json.dumps({"start": start, "top": top, "deadline": deadline})
        pending, before, slow = None, start, []
        with subprocess.Popen(
            [*command, "--work", spec], cwd=bare.ROOT, env=environment, stdout=subprocess.PIPE,
            text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            clock = _stop_late(process, seconds, slow)
            for line in process.stdout:
                clock.cancel()
                clock = _stop_late(process, seconds, slow)
                if not line.startswith("{"):  # what a library says
                    continue
                row = json.loads(line)
                if "common" in row:
                    writer.common, top = row["common"], row["top"]
                elif "status" in row:
                    writer.add(row)
                    start, pending = start + 1, None
                else:
                    pending = row
            clock.cancel()
        if pending is not None:
            why = f"took longer than {seconds:g} s" if slow else f"ended with {process.returncode}"
            writer.add(pending | {"status": f"failed: the process {why}"})
            start += 1
        elif process.returncode == 0:
            return
        if start == before:
            sys.exit(
                f"the process that makes the rows must get to one, ended with {process.returncode}"
            )


def _stop_late(
    process: "subprocess.Popen[str]", seconds: float, slow: list[bool]
) -> threading.Timer:
    def stop() -> None:
        slow.append(True)
        process.kill()

    clock = threading.Timer(seconds, stop)
    clock.daemon = True
    clock.start()
    return clock


def main() -> None:
    given = arguments()
    bare.prepare()
    if given.rank is not None:
        from benchmarks.gpu_suite import checks

        checks.rank(given.rank, given.out)
        return
    if given.work is not None:
        work(given)
        return
    if not torch.cuda.is_available() and not given.smoke:
        sys.exit(
            "benchmarks.gpu_suite needs a CUDA device and found none; nothing was measured, "
            "--smoke goes through all of it on a CPU"
        )
    from benchmarks.gpu_suite import report, tuning

    given.out.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d_%H%M%S")
    started = time.monotonic()
    writer = report.RowWriter(given.out / f"gpu_suite_{stamp}.jsonl", {})
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", str(given.out)]
    command += ["--only", given.only, *(["--smoke"] if given.smoke else [])]
    command += ["--commit", given.commit] if given.commit else []
    supervise(command, writer, started + 60 * given.minutes, ROW_SECONDS)
    if not writer.rows:
        sys.exit(f"--only must be part of an op's name, got {given.only!r}; leave it out for all")
    print("\n".join([report.head(writer.common), report.table(writer.rows)]))
    print("\n".join(["tuning proposals:", *(tuning.proposals(writer.rows) or ["none"])]))
    print(f"{len(writer.rows)} rows in {writer.path}, {time.monotonic() - started:.0f} s")
    if wrong := [row for row in writer.rows if row["status"].startswith(("wrong", "failed"))]:
        sys.exit(f"{len(wrong)} rows are wrong or failed")


if __name__ == "__main__":
    main()
