"""`python -m benchmarks.gpu_suite --minutes 8 --out DIR`."""

import argparse
import datetime
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu_suite import bare


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="stop to start cases after it")
    parser.add_argument("--out", type=Path, required=True, help="directory for the JSON lines")
    parser.add_argument("--only", default="", help="part of an op's name")
    parser.add_argument("--commit", help="for a tree without git")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_suite needs a CUDA device and found none; nothing was measured")
    bare.prepare()
    from benchmarks.gpu_suite import report, run, timing

    given.out.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d_%H%M%S")
    common = report.surroundings(given.commit)
    print(f"{common['device']}, torch {common['torch']}, triton {common['triton']}")
    started = time.monotonic()
    top = timing.ceilings(0.5)
    print(f"ceilings: {top.bandwidth / 1e12:.2f} TB/s, {top.arithmetic / 1e12:.0f} TFLOP/s")
    common |= {"ceiling_bytes_per_s": top.bandwidth, "ceiling_flops_per_s": top.arithmetic}
    writer = report.RowWriter(given.out / f"gpu_suite_{stamp}.jsonl", common)
    suite = run.Suite(writer, top, started + 60 * given.minutes, given.only)
    suite.run(run.SHAPES)
    print(report.table(writer.rows))
    print(f"{len(writer.rows)} rows in {writer.path}, {time.monotonic() - started:.0f} s")
    if any(row["status"].startswith("wrong") for row in writer.rows):
        sys.exit("a candidate is wrong and was not timed")


if __name__ == "__main__":
    main()
