"""Rows of JSON, and the short table of them."""

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_suite.bare import ROOT
from benchmarks.gpu_suite.case import Shape
from benchmarks.gpu_suite.timing import DevicePeaks, Quantiles

Row = dict[str, Any]


def _output(*command: str) -> str:
    """What a command prints, or "unknown"."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def surroundings(commit: str | None) -> Row:
    """What every row says of where it was measured."""
    import triton

    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"
    device: Row = {"device": "CPU, kernels interpreted"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {
            "device": properties.name,
            "sm_count": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver, sm clock, memory clock, power": _output(
                "nvidia-smi", query, "--format=csv,noheader"
            ),
        }
    return device | {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": commit or _output("git", "rev-parse", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def bound_ms(n_bytes: float, flops: float, top: DevicePeaks) -> float:
    """The time that the ceilings leave for so many bytes and operations."""
    return 1e3 * max(n_bytes / top.bandwidth, flops / top.arithmetic)


def timed(row: Row, times: Quantiles, n_bytes: float, flops: float, top: DevicePeaks) -> Row:
    """Complete a row with times and with what the ceilings would allow."""
    bound = bound_ms(n_bytes, flops, top)
    return row | {
        "status": "ok",
        "median_ms": times.median,
        "p20_ms": times.p20,
        "p80_ms": times.p80,
        "n_times": times.n_times,
        "bytes": n_bytes,
        "flops": flops,
        "bound_ms": bound,
        "share_of_bound": bound / times.median,
    }


def named(
    op: str, shape: Shape, dtype: torch.dtype, candidate: str, pattern: str = "uniform"
) -> Row:
    """What a row is about, by which rows of two files are matched."""
    return {
        "op": op,
        "shape": dict(shape._asdict()),
        "dtype": str(dtype).removeprefix("torch."),
        "pattern": pattern,
        "candidate": candidate,
    }


class RowWriter:
    """Appends rows to a file as they are made, each with the surroundings."""

    def __init__(self, path: Path, common: Row) -> None:
        self.path, self.common = path, common
        self.rows: list[Row] = []

    def begin(self, row: Row) -> None:
        """Nothing: a row is written when it is done."""

    def add(self, row: Row) -> None:
        """Write a row at once, so that a run that is cut short leaves what it had."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | self.common) + "\n")


def head(common: Row) -> str:
    """Where the rows are from, and what the device reached."""
    where = f"{common['device']}, torch {common['torch']}, triton {common['triton']}"
    bandwidth, arithmetic = (common[f"ceiling_{of}_per_s"] / 1e12 for of in ("bytes", "flops"))
    return f"{where}\nceilings: {bandwidth:.2f} TB/s, {arithmetic:.0f} TFLOP/s"


def table(rows: list[Row]) -> str:
    """One line a row: what, the median, the share of the bound, and the first candidate's gain.

    Of a step also the thousands of rows per second and the multiple of the time that is aimed at.
    """
    lines = [f"{'op':26} {'shape':30} {'dtype':9} {'candidate':30} {'ms':>9} {'bound':>6} {'x':>6}"]
    ours: Row = {}
    for row in rows:
        key = {name: row[name] for name in ("op", "shape", "dtype", "pattern")}
        if {name: ours.get(name) for name in key} != key:
            ours = row
        what = row["op"] + ("" if row["pattern"] == "uniform" else f" ({row['pattern']})")
        line = f"{what:26} {Shape(**row['shape'])!s:30} {row['dtype']:9} {row['candidate']:30} "
        if row["status"] != "ok" or "median_ms" not in row:
            lines.append(line + row["status"])
            continue
        gain = row["median_ms"] / ours.get("median_ms", float("nan"))
        share = f"{100 * row['share_of_bound']:5.0f}%"
        line += f"{row['median_ms']:9.3f} {share} {gain:6.2f}"
        if "rows_per_s" in row:
            line += f" {row['rows_per_s'] / 1e3:8.0f} k rows/s"
        if row.get("times_goal") is not None:
            line += f", {row['times_goal']:.2f} x the goal"
        lines.append(line)
    return "\n".join(lines)
