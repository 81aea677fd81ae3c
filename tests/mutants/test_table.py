"""The table of mutants cannot rot: each can still be put in, and each claim names a test."""

from pathlib import Path

import pytest

from tests.mutants import run
from tests.mutants.run import FAILED, PASSED, Mutant, Tree, mutants, problems


def test_every_mutant_can_be_put_in_and_is_claimed_by_tests_that_are_there():
    result = mutants()
    assert len(result) >= 60
    assert len({mutant.name for mutant in result}) == len(result)
    assert all(mutant.tests for mutant in result)
    assert [line for mutant in result for line in problems(mutant)] == []


def test_what_cannot_be_put_in_is_told(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    mutant = Mutant("twice", "a.py", "x = 1", "x = 2", ("b.py::test_c", "a.py::test_d"))
    assert problems(mutant, tmp_path) == [
        "twice: its old text must occur once in a.py, got 2",
        "twice: b.py::test_c must be a test, got none",
        "twice: a.py::test_d must be a test, got none",
    ]
    same = Mutant("same", "a.py", "x = 1\nx", "x = 1\nx", ())
    assert problems(same, tmp_path) == ["same: its old text must occur once in a.py, got 1"]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree with one file and two tests of it; one of them looks at nothing."""
    monkeypatch.setattr(Tree, "__init__", lambda self, path: setattr(self, "path", path))
    (tmp_path / "a.py").write_text("def half(n):\n    return n // 2\n")
    tests = "import a\ndef test_seen():\n    assert a.half(5) == 2\n"
    (tmp_path / "test_a.py").write_text(tests + "def test_blind():\n    assert a.half(4) == 2\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\nmarkers =\n    long: slow\n")
    return Tree(tmp_path)


def test_a_mutant_is_killed_by_a_failing_test_alone(tree):
    def outcome(new: str, test: str) -> bool:
        mutant = Mutant("m", "a.py", "n // 2", new, (f"test_a.py::{test}",))
        return tree.outcome(mutant).is_killed

    assert tree.tested(["test_a.py"])[0] == PASSED
    assert outcome("-(-n // 2)", "test_seen")
    assert not outcome("-(-n // 2)", "test_blind")
    assert not outcome("-(-n // 2)", "test_that_is_gone")
    assert not outcome("n // (", "test_seen")  # no test ran
    assert (tree.path / "a.py").read_text() == "def half(n):\n    return n // 2\n"
    assert tree.tested(["test_a.py"])[0] == PASSED


def test_a_survivor_is_an_exit_code_of_1(monkeypatch, capsys, tmp_path):
    outcomes = [run.Outcome(mutant, mutant.name != "b", "", 1.4) for mutant in map(named, "ab")]
    monkeypatch.setattr(run, "mutants", lambda: [named(name) for name in "ab"])
    monkeypatch.setattr(run, "problems", lambda mutant: [])
    monkeypatch.setattr(run, "run", lambda some, n, scratch: outcomes[: len(some)])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- mutants -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(run.sys, "argv", ["run", "--record", str(page)])
    assert run.main() == FAILED
    assert "1 of 2 are killed" in capsys.readouterr().out
    assert "| b | `f.py` | **nobody** | 1 |" in page.read_text()
    assert "| a | `f.py` | `t.py` `test_x` | 1 |\n" in page.read_text()
    assert "1 of 2 are killed." in page.read_text()
    assert "old" not in page.read_text()
    outcomes[0] = run.Outcome(named("b"), True, "", 2.4)
    monkeypatch.setattr(run.sys, "argv", ["run", "b", "--record", str(page)])
    assert run.main() == PASSED
    assert "2 of 2 are killed." in page.read_text()
    assert "| a | `f.py` | `t.py` `test_x` | 1 |\n| b | `f.py` | `t.py` `test_x` | 2 |\n" in (
        page.read_text()
    )


def named(name: str) -> Mutant:
    return Mutant(name, "f.py", "old", "new", ("tests/t.py::test_x",))


def test_a_copy_has_what_git_knows_and_what_is_new(tmp_path, repository):
    tree = Tree(tmp_path / "copy")
    assert (tree.path / "sae/metrics.py").read_bytes() == (
        repository / "sae/metrics.py"
    ).read_bytes()
    assert (tree.path / Path(__file__).relative_to(repository)).is_file()
    assert not (tree.path / ".git").exists()
