"""Random changes of the files of a cache and of a dictionary; `fuzz.py` says which."""

import json
import subprocess
import sys

import pytest

from tests.faults.fuzz import CORPUS, PLAIN, SEALED

FILES = [*SEALED, *PLAIN]
LONG = (pytest.mark.long, pytest.mark.timeout(1500))


@pytest.mark.parametrize(
    ("n", "names"),
    [(100, FILES), *(pytest.param(10_000, [name], marks=LONG) for name in FILES)],
)
def test_a_changed_file_is_read_or_refused(n, names, tmp_path, repository, figure):
    assert len(list(CORPUS.iterdir())) >= 6
    command = [sys.executable, "-m", "tests.faults.fuzz", str(tmp_path), str(n), *names]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert list(result) == names
    for name, seen in result.items():
        assert seen["refused"] > sum(seen.values()) / 3
        figure(
            "S4",
            f"`{name}`: {seen['refused']:,} changed files refused and {seen['read']:,} read, each "
            "within 1 s; 0 errors of another class",
        )
