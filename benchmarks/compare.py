"""Compares two runs of the GPU suite: `python benchmarks/compare.py BEFORE.jsonl AFTER.jsonl`.

Fails where a median grew by more than 5 % and the 20 to 80 % ranges do not overlap, or where a
row that was measured before is not any more.
"""

import json
import sys
from pathlib import Path
from typing import Any

KEY = ("op", "shape", "dtype", "pattern", "candidate")
LIMIT = 1.05

Row = dict[str, Any]


def read(path: Path) -> dict[str, Row]:
    """The rows of a file by what they measure; the last one of each."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {json.dumps([row[name] for name in KEY]): row for row in rows}


def verdict(before: Row, after: Row | None) -> tuple[str, bool]:
    """What became of a row, and whether that is a failure."""
    if before["status"] != "ok":
        return f"was {before['status']}", False
    if after is None:
        return "missing", True
    if after["status"] != "ok":
        return after["status"], True
    ratio = after["median_ms"] / before["median_ms"]
    apart = after["p20_ms"] > before["p80_ms"] or after["p80_ms"] < before["p20_ms"]
    if not apart or 1 / LIMIT <= ratio <= LIMIT:
        return f"{ratio:.2f} same", False
    return f"{ratio:.2f} {'slower' if ratio > 1 else 'faster'}", ratio > 1


def compare(before: dict[str, Row], after: dict[str, Row]) -> int:
    """Print a line for each row; return how many failed."""
    failures = 0
    for key, row in before.items():
        text, failed = verdict(row, after.get(key))
        shape = " ".join(f"{name}={size}" for name, size in row["shape"].items())
        print(f"{row['op']}, {shape}, {row['dtype']}, {row['pattern']}, {row['candidate']}: {text}")
        failures += failed
    return failures


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/compare.py BEFORE.jsonl AFTER.jsonl")
    failures = compare(*(read(Path(name)) for name in sys.argv[1:]))
    if failures:
        sys.exit(f"{failures} rows are slower, wrong or missing")


if __name__ == "__main__":
    main()
