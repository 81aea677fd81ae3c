"""A reader opens one file to understand one thing, sees a function whole, and meets a name once."""

import ast
from collections import defaultdict
from collections.abc import Iterator

import pytest

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCK = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.Match)

NAMED = {"sae", "activations_cache", "kernels", "monosema", "benchmarks"}
"""Folders in which a class name is defined once."""
MOST_FILES = 256
"""Python files of the three packages, with their `__init__.py`."""
SMALLEST = 80
"""Lines below which a file needs a reason."""
SMALL = {
    "monosema/facade.py": "below all packages",
    "sae/cli/__main__.py": "Python's name for `python -m sae.cli`",
    "sae/cross_layer.py": "several autoencoders, below their training",
    "sae/pretrained/goodfire.py": "one file per format",
    "sae/pretrained/llama_scope_r1.py": "one file per format",
    "sae/pretrained/openai.py": "one file per format",
    "sae/pretrained/qwen_scope.py": "one file per format",
    "sae/pretrained/saev.py": "one file per format",
    "sae/train/hook_points.py": "read before torch is loaded",
    "sae/train/signals.py": "what a scheduler says, whoever trains",
}
"""File -> why it is small; `__init__.py` needs no reason."""


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


def test_the_packages_have_at_most_256_files(library):
    paths = [source.path for source in library if not source.path.startswith("monosema/")]
    assert len(paths) <= MOST_FILES, (
        f"{len(paths)} files; put the code into the file of its subject"
    )


def test_a_small_file_has_a_reason(library):
    small = {
        source.path
        for source in library
        if len(source.text.splitlines()) < SMALLEST and not source.path.endswith("__init__.py")
    }
    assert small == SMALL.keys()
    assert len(SMALL) <= 25


def class_names(trees: dict[str, ast.Module]) -> dict[str, list[str]]:
    """Name of a top-level class -> the files that define it."""
    files = defaultdict(list)
    for path, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                files[node.name].append(path)
    return files


def test_a_class_name_means_one_thing(sources):
    trees = {s.path: s.tree for s in sources if s.path.partition("/")[0] in NAMED}
    twice = {name: paths for name, paths in class_names(trees).items() if len(paths) > 1}
    assert not twice, "\n".join(f"{name}: {', '.join(paths)}" for name, paths in twice.items())


def test_a_class_name_that_stands_twice_is_listed():
    one, two = ast.parse("class A: pass\nclass B: pass"), ast.parse("class B: pass")
    assert class_names({"one": one, "two": two}) == {"A": ["one"], "B": ["one", "two"]}


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
