"""A test that cannot fail is no test."""

import ast
import re

import pytest

CHECKS = re.compile(r"raises|warns|check|assert|expect|fail|verify|deprecated_call|gradcheck")


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def can_fail(function: ast.FunctionDef, helpers: set[str]) -> bool:
    """Whether it asserts, or calls one of the helpers, or what by its name checks."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in helpers or CHECKS.search(ast.unparse(node)):
                return True
    return False


def those_that_can_fail(tree: ast.Module) -> set[str]:
    """The functions of a file that can fail, by themselves or by calling another of the file."""
    known: set[str] = set()
    while more := {f.name for f in functions(tree) if can_fail(f, known)} - known:
        known |= more
    return known


def is_always_true(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=value):
            return bool(value)
        case ast.Tuple(elts=elements):
            return bool(elements)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(map(is_always_true, values))
        case ast.BoolOp(op=ast.And(), values=values):
            return all(map(is_always_true, values))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            is_count = re.search(r"^len\(|\.numel\(\)$", ast.unparse(left)) is not None
            same = ast.dump(left) == ast.dump(right) and isinstance(op, ast.Eq | ast.Is)
            return same or (is_count and isinstance(op, ast.GtE) and ast.unparse(right) == "0")
    return False


@pytest.mark.parametrize(
    ("condition", "answer"),
    [
        ("True", True),
        ("1", True),
        ("(x, 'why')", True),
        ("x or True", True),
        ("len(x) >= 0", True),
        ("x.numel() >= 0", True),
        ("f(x) == f(x)", True),
        ("x", False),
        ("len(x) >= 1", False),
        ("x and True", False),
        ("False", False),
    ],
)
def test_is_always_true(condition, answer):
    assert is_always_true(ast.parse(condition, mode="eval").body) is answer


def test_no_assertion_is_always_true(sources):
    results = [
        f"{source.path}:{node.lineno}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Assert) and is_always_true(node.test)
    ]
    assert not results, "\n".join(results)


def test_every_test_can_fail(sources):
    results = [
        f"{source.path}:{function.lineno} {function.name}"
        for source in sources
        if source.path.startswith("tests/")
        for able in [those_that_can_fail(source.tree)]
        for function in functions(source.tree)
        if function.name.startswith("test_")
        if function.name not in able
    ]
    assert not results, "\n".join(results)


def test_a_test_that_cannot_fail_is_found():
    code = "def a():\n  assert x\ndef b():\n  a()\ndef test_c():\n  b()\ndef test_d():\n  run(c())"
    assert those_that_can_fail(ast.parse(code)) == {"a", "b", "test_c"}


def test_test_folders_are_no_packages(repository):
    # With --import-mode=importlib files of the same name may stand in several folders.
    assert list((repository / "tests").rglob("__init__.py")) == []
