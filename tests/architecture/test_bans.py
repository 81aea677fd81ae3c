"""What no file does, with the few reviewed exceptions named here."""

import ast
from collections import defaultdict
from collections.abc import Iterator

import pytest

BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
BANNED_CALLS = {
    "eval",
    "exec",
    "print",
    "torch.load",
    "np.load",
    "numpy.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
}
BANNED_ARGUMENTS = {
    "shell": True,
    "trust_remote_code": True,
    "allow_pickle": True,
    "weights_only": False,
}
ENVIRONMENT = ("os.environ", "os.getenv", "os.putenv", "os.environb")

UNSAFE_BY_REVIEW = {"sae/pretrained/pickled_child.py": {"torch.load"}}
"""File -> what it may do: one module at most, which reads foreign files in a closed process."""

READS_ENVIRONMENT = {
    "activations_cache/builder.py": "the rank and the device that a launcher gave this process",
    "activations_cache/conversion.py": "where converted models are kept",
    "activations_cache/shared_text.py": "the tasks that SLURM started",
    "sae/cli/__init__.py": "how threads wait, set before torch is imported",
    "sae/cli/troubles.py": "values of keys, so that they stand in no report; SLURM's job",
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every banned thing in a file, as (line, name)."""
    for node in ast.walk(tree):
        for module in imported(node):
            if module.partition(".")[0] in BANNED_MODULES:
                yield node.lineno, module
        if isinstance(node, ast.ImportFrom):
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from ((node.lineno, name) for name in names if name in BANNED_CALLS)
        if isinstance(node, ast.Call):
            if dotted(node.func) in BANNED_CALLS:
                yield node.lineno, dotted(node.func)
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in BANNED_ARGUMENTS and value is BANNED_ARGUMENTS[keyword.arg]:
                    yield node.lineno, f"{keyword.arg}={value}"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import pickle", "pickle"),
        ("from dill.source import x", "dill.source"),
        ("from torch import load", "torch.load"),
        ("x = torch.load(f)", "torch.load"),
        ("np.load(f)", "np.load"),
        ("eval(x)", "eval"),
        ("yaml.load(f, L)", "yaml.load"),
        ("run(c, shell=True)", "shell=True"),
        ("f(trust_remote_code=True)", "trust_remote_code=True"),
        ("model.eval(); safetensors.torch.load(b); f(shell=False); load(x)", None),
    ],
)
def test_the_search_finds_what_is_banned(code, name):
    assert list(unsafe(ast.parse(code))) == ([(1, name)] if name else [])


def test_the_library_runs_no_code_from_files_and_prints_nothing(library):
    results = [
        f"{source.path}:{line} {name}"
        for source in library
        for line, name in unsafe(source.tree)
        if name not in UNSAFE_BY_REVIEW.get(source.path, set())
    ]
    assert not results, "\n".join(results)


def test_only_known_files_read_the_environment(library):
    readers = {
        source.path
        for source in library
        for node in ast.walk(source.tree)
        if dotted(node) in ENVIRONMENT or (isinstance(node, ast.ImportFrom) and node.module == "os")
    }
    assert readers - READS_ENVIRONMENT.keys() == set()


def test_annotations_are_live(sources):
    # `from __future__ import annotations` would hide the shapes from jaxtyping.
    results = [
        s.path for s in sources for node in ast.walk(s.tree) if "__future__" in imported(node)
    ]
    assert not results, "\n".join(results)


def test_nothing_is_imported_from_a_facade_above_it(library):
    # A facade is for users: a module that imports names from its package's root makes a cycle.
    modules = {source.path.removeprefix("kernels/").removesuffix(".py") for source in library}
    results = [
        f"{source.path}:{node.lineno} {name}"
        for source in library
        for node in ast.walk(source.tree)
        for name in facade_names(node, modules)
        if source.path.removeprefix("kernels/").startswith(name.rpartition("/")[0] + "/")
        and not source.path.endswith("__init__.py")
    ]
    assert not results, "\n".join(results)


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from sae import load", ["sae/load"]),
        ("from sae import load, losses", ["sae/load"]),
        ("from sae.losses import load", []),
        ("from sae import train", []),
        ("from sae.train import fit", ["sae/train/fit"]),
        ("import sae", ["sae/*"]),
        ("import sae.losses", []),
    ],
)
def test_facade_names(code, names):
    modules = {"sae/__init__", "sae/losses", "sae/train/__init__"}
    assert facade_names(ast.parse(code).body[0], modules) == names


def facade_names(node: ast.AST, modules: set[str]) -> list[str]:
    """What an import takes from a package itself, as package/name; its modules do not count."""
    if isinstance(node, ast.Import):
        paths = [alias.name.replace(".", "/") for alias in node.names]
        return [f"{path}/*" for path in paths if f"{path}/__init__" in modules]
    if not isinstance(node, ast.ImportFrom) or node.module is None:
        return []
    package = node.module.replace(".", "/")
    names = [f"{package}/{alias.name}" for alias in node.names]
    taken = [name for name in names if not {name, f"{name}/__init__"} & modules]
    return taken if f"{package}/__init__" in modules else []


UNTYPED_BY_REVIEW = {"sae/pretrained/pickled_child.py", "monosema/checks.py"}
"""Runs alone in a confined process; defines the class."""


def untyped(tree: ast.AST) -> Iterator[int]:
    """Lines in which a ValueError without a class of ours is raised, returned or made a base."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
            raised = node.value.func
        elif isinstance(node, ast.ClassDef):
            raised = next((base for base in node.bases if dotted(base) == "ValueError"), None)
        else:
            continue
        if raised is not None and dotted(raised) == "ValueError":
            yield node.lineno


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("raise ValueError('x')", [1]),
        ("raise ValueError", [1]),
        ("def f():\n    return ValueError('x')", [2]),
        ("class E(ValueError):\n    pass", [1]),
        ("raise MonosemaError('x')", []),
        ("raise", []),
    ],
)
def test_the_search_finds_a_bare_value_error(code, lines):
    assert list(untyped(ast.parse(code))) == lines


def test_what_a_caller_can_cause_has_a_class_of_ours(library):
    results = [
        f"{source.path}:{line} raises a bare ValueError; raise MonosemaError"
        for source in library
        if source.path not in UNTYPED_BY_REVIEW and not source.path.endswith("launch.py")
        for line in untyped(source.tree)
    ]
    assert not results, "\n".join(results)


def test_every_setting_is_read_somewhere(library):
    """What is checked and then read by nobody is worse than no setting."""
    reads, texts = defaultdict(set), defaultdict(set)
    for source in library:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                reads[node.attr].add((source.path, node.lineno))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts[node.value].add((source.path, node.lineno))
    unread = [
        f"{source.path}: {kind.name}.{setting.target.id}"
        for source in library
        if "config" in source.path.rpartition("/")[2] or source.path == "sae/architecture.py"
        for kind in source.tree.body
        if isinstance(kind, ast.ClassDef)
        for setting in kind.body
        if isinstance(setting, ast.AnnAssign)
        and not {
            (path, line)
            for path, line in reads[setting.target.id] | texts[setting.target.id]
            if path != source.path or not kind.lineno <= line <= kind.end_lineno
        }
    ]
    assert unread == []
