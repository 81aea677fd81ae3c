"""A reader opens one file to understand one thing, and sees a function whole."""

import ast
from collections.abc import Iterator

import pytest

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCK = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.Match)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTION))


def depth(node: ast.AST, is_elif: bool = False) -> int:
    """How deep branches and loops stand in each other; `elif` is not deeper than its `if`."""
    inner = [depth(child, is_elif=is_branch) for child, is_branch in children(node)]
    return max(inner, default=0) + (isinstance(node, BLOCK) and not is_elif)


def children(node: ast.AST) -> Iterator[tuple[ast.AST, bool]]:
    branches = node.orelse if isinstance(node, ast.If) and len(node.orelse) == 1 else []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, FUNCTION):
            yield child, child in branches and isinstance(child, ast.If)


def test_files_are_at_most_400_lines(sources):
    lengths = {source.path: len(source.text.splitlines()) for source in sources}
    long = [f"{path}: {n}" for path, n in lengths.items() if n > 400]
    assert not long, "\n".join(long)


def test_functions_are_at_most_60_lines(sources):
    lengths = [
        (
            f"{source.path}:{function.lineno} {function.name}",
            function.end_lineno - function.lineno + 1,
        )
        for source in sources
        for function in functions(source.tree)
    ]
    long = [f"{name}: {n}" for name, n in lengths if n > 60]
    assert not long, "\n".join(long)


def test_blocks_nest_at_most_3_deep(library):
    depths = [
        (f"{source.path}:{function.lineno} {function.name}", max(map(depth, function.body)))
        for source in library
        for function in functions(source.tree)
    ]
    long = [f"{name}: {n}" for name, n in depths if n > 3]
    assert not long, "\n".join(long)


@pytest.mark.parametrize(
    ("code", "levels"),
    [
        ("x = 1", 0),
        ("if a:\n  pass\nelif b:\n  pass\nelif c:\n  pass", 1),
        ("if a:\n  pass\nelse:\n  if b:\n    pass\n  x = 1", 2),
        (
            "for a in b:\n  with c:\n    try:\n      if d:\n        pass\n    except e: pass",
            3,
        ),
        ("if a:\n  def f():\n    if b:\n      pass", 1),
    ],
)
def test_depth_counts_blocks(code, levels):
    assert max(map(depth, ast.parse(code).body)) == levels
