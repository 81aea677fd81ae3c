"""Every test that the page on known answers names is there."""

import ast
import re

import pytest

NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@pytest.fixture(scope="module")
def named(repository) -> list[tuple[str, str]]:
    return NAMED.findall((repository / "docs" / "known_answers.md").read_text())


def test_each_is_a_test_of_its_file(repository, named):
    assert len(named) > 60
    gone = []
    for file, name in named:
        path = repository / file
        tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            gone.append(f"{file}::{name}")
    assert gone == []


def test_every_row_names_one(repository):
    lines = (repository / "docs" / "known_answers.md").read_text().splitlines()
    rows = [
        line for line in lines if line.startswith("| ") and not line.endswith(("| test |", "|---|"))
    ]
    assert [row for row in rows if not NAMED.search(row)] == []
