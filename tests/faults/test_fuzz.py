"""Random changes of the files of a cache and of a dictionary; `fuzz.py` says which.

`corpus/` has what was mishandled once: a number, then the name of the file whose place it takes.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import fuzz

CORPUS = Path(__file__).with_name("corpus")
N = {"short": 300, "long": 10_000}


@pytest.mark.parametrize("name", [*fuzz.SEALED, *fuzz.PLAIN])
@pytest.mark.parametrize(
    "length", ["short", pytest.param("long", marks=[pytest.mark.long, pytest.mark.timeout(1500)])]
)
def test_a_changed_file_is_read_or_refused(name, length, tmp_path, repository, figure):
    command = [sys.executable, "-m", "tests.faults.fuzz", str(tmp_path), name, str(N[length])]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen["refused"] > sum(seen.values()) / 3
    figure(
        "S4",
        f"`{name}`: {seen['refused']:,} changed files refused and {seen['read']:,} read, each "
        "within 1 s; 0 errors of another class",
    )


@pytest.mark.parametrize("file", sorted(CORPUS.iterdir()), ids=lambda file: file.name)
def test_what_was_mishandled_once_is_refused(file, tmp_path, repository):
    code = (
        "import sys, pathlib; from tests.faults import fuzz; here, file, name = sys.argv[1:];"
        "here = pathlib.Path(here); fuzz.make(here);"
        "path = here / ('cache' if name in fuzz.SEALED else 'dictionary');"
        "sys.exit(fuzz.look(path, name, pathlib.Path(file).read_bytes()) is None)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(file), file.name.partition("-")[2]]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
