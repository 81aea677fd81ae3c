import json
import subprocess
import sys

import pytest

from benchmarks.compare import compare, read

ROW = {
    "op": "select",
    "shape": {"d_model": 2, "d_sae": 3, "k": 1, "batch": 5},
    "dtype": "float32",
    "pattern": "uniform",
    "candidate": "triton",
    "status": "ok",
    "median_ms": 10.0,
    "p20_ms": 9.9,
    "p80_ms": 10.1,
}


def run_of(**changes):
    return {"key": ROW | changes}


@pytest.mark.parametrize(
    ("after", "text", "failures"),
    [
        ({}, "1.00 same", 0),
        ({"median_ms": 10.4, "p20_ms": 10.3, "p80_ms": 10.5}, "1.04 same", 0),
        ({"median_ms": 10.6, "p20_ms": 10.5, "p80_ms": 10.7}, "1.06 slower", 1),
        ({"median_ms": 20.0, "p20_ms": 10.0, "p80_ms": 30.0}, "2.00 same", 0),
        ({"median_ms": 5.0, "p20_ms": 4.9, "p80_ms": 5.1}, "0.50 faster", 0),
        ({"status": "wrong: error 1"}, "wrong: error 1", 1),
    ],
)
def test_verdicts(after, text, failures, capsys):
    assert compare(run_of(), run_of(**after)) == failures
    shape = "d_model=2 d_sae=3 k=1 batch=5"
    assert capsys.readouterr().out == f"select, {shape}, float32, uniform, triton: {text}\n"


def test_a_row_that_is_gone_fails_and_one_that_never_was_does_not(capsys):
    assert compare(run_of(), {}) == 1
    assert compare(run_of(status="failed: x"), {}) == 0
    assert compare({}, run_of()) == 0
    assert "missing" in capsys.readouterr().out


def test_the_command_fails_with_the_number_of_rows(tmp_path, repository):
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    other = ROW | {"op": "decode"}
    before.write_text("\n".join(map(json.dumps, [ROW, other])) + "\n")
    slow = {"median_ms": 20.0, "p20_ms": 19.0, "p80_ms": 21.0}
    after.write_text("\n".join(map(json.dumps, [ROW | slow, ROW, other | slow])) + "\n")
    assert len(read(after)) == 2  # the last row of each

    def run(*names):
        command = [sys.executable, str(repository / "benchmarks" / "compare.py"), *map(str, names)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(before, after)
    assert (done.returncode, done.stderr) == (1, "1 rows are slower, wrong or missing\n")
    assert run(before, before).returncode == 0
    assert run(before).stderr.startswith("usage: ")
