"""Put seeded mutants into copies of the tree, and see which the tests kill.

`python -m tests.mutants.run [WORDS...]` runs those of `table.toml` whose names hold one of the
words, by default all. First the tests must pass without a mutant; then those named for it must
fail with it. The exit code is 1 where a mutant survives, or can no longer be put in.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from tests.figures import put_table

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("table.toml")
SECONDS = 600
PASSED, FAILED = 0, 1
"""Exit codes of pytest; any other one says that the tests did not run."""
NOBODY = "**nobody**"


class Mutant(NamedTuple):
    """A fault that somebody could make, and who claims to notice it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


class Outcome(NamedTuple):
    """What became of a mutant."""

    mutant: Mutant
    is_killed: bool
    said: str
    seconds: float


def mutants() -> list[Mutant]:
    """All that are in the table."""
    entries = tomllib.loads(TABLE.read_text())["mutant"]
    return [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def problems(mutant: Mutant, root: Path = ROOT) -> list[str]:
    """Why a mutant cannot be put into a tree, or who claims to kill it and is not there."""
    results = []
    n = (root / mutant.file).read_text().count(mutant.old)
    if n != 1 or mutant.old == mutant.new:
        results.append(f"{mutant.name}: its old text must occur once in {mutant.file}, got {n}")
    for test in mutant.tests:
        path, _, function = test.partition("::")
        text = (root / path).read_text() if (root / path).is_file() else ""
        if not text or (function and f"def {function.partition('[')[0]}(" not in text):
            results.append(f"{mutant.name}: {test} must be a test, got none")
    return results


class Tree:
    """A copy of what git knows of the project."""

    clock = count(10**9, 10)
    """Times of change: no two states of a file have one, or Python would take old bytecode."""

    def __init__(self, path: Path) -> None:
        """Make it."""
        self.path = path
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, names.split("\0")):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                shutil.copy2(ROOT / name, path / name)

    def put(self, file: str, text: str) -> None:
        """Write a file."""
        (self.path / file).write_text(text)
        now = next(self.clock)
        os.utime(self.path / file, (now, now))

    def tested(
        self, tests: Sequence[str], *options: str, seconds: float = SECONDS
    ) -> tuple[int, str]:
        """Run tests; the exit code of pytest, and the last lines of what it said."""
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header",
            "-m", "long or not long", "--tb=line", *options, *tests,
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": f"{self.path}:{self.path / 'kernels'}"}
        try:
            done = subprocess.run(
                command, cwd=self.path, env=environment, capture_output=True, text=True,
                timeout=seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return FAILED, f"no end within {seconds} s"
        return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-15:])

    def outcome(self, mutant: Mutant) -> Outcome:
        """Put a mutant in, run its tests and take it out again."""
        before, began = (self.path / mutant.file).read_text(), time.monotonic()
        self.put(mutant.file, before.replace(mutant.old, mutant.new))
        try:
            code, said = self.tested(mutant.tests, "-x", "--timeout=120")
        finally:
            self.put(mutant.file, before)
        return Outcome(mutant, code == FAILED, said, time.monotonic() - began)


def run(some: Sequence[Mutant], n_workers: int, scratch: Path) -> list[Outcome]:
    """Run mutants in as many trees as there are workers.

    Raises:
        SystemExit: If the tests fail without a mutant.
    """
    trees: SimpleQueue[Tree] = SimpleQueue()
    for number in range(n_workers):
        trees.put(Tree(scratch / str(number)))
    tree = trees.get()
    tests = sorted({test for mutant in some for test in mutant.tests})
    code, said = tree.tested(tests, "-n", str(n_workers), "--dist", "loadfile", seconds=3600)
    trees.put(tree)
    if code != PASSED:
        raise SystemExit(f"the tests must pass without a mutant, got:\n{said}")
    write(f"{len(tests)} tests pass without a mutant")

    def one(mutant: Mutant) -> Outcome:
        tree = trees.get()
        try:
            result = tree.outcome(mutant)
        finally:
            trees.put(tree)
        verdict = "killed  " if result.is_killed else "SURVIVED"
        write(f"{verdict} {result.seconds:5.0f} s  {mutant.name}")
        if not result.is_killed:
            write(result.said)
        return result

    with ThreadPoolExecutor(n_workers) as pool:
        return list(pool.map(one, some))


def write(line: str) -> None:
    """Show a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def row(outcome: Outcome) -> str:
    """An outcome as a line of the table; the name of the mutant is its first cell."""
    mutant, is_killed, _, seconds = outcome
    tests = ", ".join(f"`{test.removeprefix('tests/')}`" for test in mutant.tests)
    by = tests.replace("::", "` `") if is_killed else NOBODY
    return f"| {mutant.name} | `{mutant.file}` | {by} | {seconds:.0f} |"


def record(page: Path, results: Sequence[Outcome], all_names: Sequence[str]) -> None:
    """Put outcomes into a page; those of mutants that were not run now stay as they are there."""
    before = {
        line.split("|")[1].strip(): line for line in page.read_text().splitlines() if "|" in line
    }
    now = before | {outcome.mutant.name: row(outcome) for outcome in results}
    rows = [now[name] for name in all_names if name in now]
    n = sum(NOBODY not in line for line in rows)
    head = ["| mutant | in | by | s |", "|---|---|---|---|"]
    put_table(page, "mutants", [f"{n} of {len(all_names)} are killed.", "", *head, *rows])


def main() -> int:
    """Run those that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of the names of mutants; all by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--record", type=Path, help="the page that the table is written into")
    asked = parser.parse_args()
    some = [m for m in mutants() if not asked.words or any(word in m.name for word in asked.words)]
    wrong = [line for mutant in some for line in problems(mutant)]
    if wrong or not some:
        write("\n".join(wrong) or "a mutant must be named, got none of the table")
        return 1
    with tempfile.TemporaryDirectory(prefix="monosema-mutants-") as scratch:
        result = run(some, asked.workers, Path(scratch))
    write(f"{sum(outcome.is_killed for outcome in result)} of {len(result)} are killed")
    if asked.record:
        record(asked.record, result, [mutant.name for mutant in mutants()])
    return 0 if all(outcome.is_killed for outcome in result) else 1


if __name__ == "__main__":
    sys.exit(main())
