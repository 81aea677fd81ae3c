"""The source tree as the rules see it: every Python file, parsed once."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

LIBRARY = ("sae", "activations_cache", "kernels", "monosema")
AROUND = ("tests", "benchmarks", "examples", "docs")


class Source(NamedTuple):
    path: str
    """Relative to the root, with forward slashes."""
    text: str
    tree: ast.Module


def read(root: Path, folders: tuple[str, ...]) -> list[Source]:
    files = sorted(file for folder in folders for file in (root / folder).rglob("*.py"))
    texts = [(file.relative_to(root).as_posix(), file.read_text("utf-8")) for file in files]
    return [Source(path, text, ast.parse(text, path)) for path, text in texts]


@pytest.fixture(scope="session")
def library(repository: Path) -> list[Source]:
    """The files that are installed."""
    return read(repository, LIBRARY)


@pytest.fixture(scope="session")
def sources(repository: Path, library: list[Source]) -> list[Source]:
    """The files that are written by hand: the library, and what stands around it."""
    return library + read(repository, AROUND)


@pytest.fixture(scope="session")
def in_root(repository: Path) -> Callable[..., str]:
    """Run Python code in a fresh process whose working directory is the root; return its output."""

    def run(code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=repository,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
