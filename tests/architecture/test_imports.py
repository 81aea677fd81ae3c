"""What importing brings along, and what it must not disturb."""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

HEAVY = {"torch", "numpy", "transformers", "lightning", "zarr", "datasets", "matplotlib", "triton"}

LLAMA = """
import torch, transformers
config = transformers.LlamaConfig(
    vocab_size=11, hidden_size=12, intermediate_size=13, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1,
)
model = transformers.LlamaForCausalLM(config)
print(tuple(model(torch.tensor([[3, 5, 7]])).logits.shape))
"""

DISTRIBUTIONS = {
    "PIL": "pillow",
    "google_crc32c": "google-crc32c",
    "sklearn": "scikit-learn",
    "umap": "umap-learn",
    "yaml": "pyyaml",
}
"""Import name -> distribution, where they differ."""


def loaded(in_root, module: str) -> set[str]:
    """The packages that a fresh process has after importing a module."""
    code = f"import {module}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(in_root(code).split())


@pytest.mark.parametrize("module", ["sae", "activations_cache", "sae.config", "sae.cli.main"])
def test_importing_loads_nothing_heavy(in_root, module):
    assert loaded(in_root, module) & HEAVY == set()


def test_every_public_name_is_where_its_package_says(in_root, library):
    packages = [
        source.path.removeprefix("kernels/").removesuffix("/__init__.py").replace("/", ".")
        for source in library
        if source.path.endswith("/__init__.py") and "__getattr__" in source.text
    ]
    assert len(packages) >= 9
    code = f"""
import importlib
for package in {packages}:
    module = importlib.import_module(package)
    public = getattr(module, "__all__", dir(module))
    assert set(dir(module)) == set(public), package
    for name in public:
        getattr(module, name)
print("all there")
"""
    assert in_root(code) == "all there"


def test_the_jobs_load_lightning_when_they_train(in_root):
    assert "lightning" not in loaded(in_root, "sae.run.steps, sae.run.pipeline")


def test_importing_the_kernels_loads_no_triton(in_root):
    assert loaded(in_root, "sae_kernels") & (HEAVY - {"torch", "numpy"}) == set()


def test_configs_need_the_standard_library_alone(in_root, library):
    configs = [s.path for s in library if re.search(r"(/|^)(config|architecture)\.py$", s.path)]
    assert len(configs) >= 3
    modules = ", ".join(path.removesuffix(".py").replace("/", ".") for path in configs)
    assert loaded(in_root, modules) & (HEAVY | {"pydantic", "yaml", "rich", "typer"}) == set()


def test_kernels_is_no_package(repository):
    # Hugging Face's `kernels` is imported by transformers: a second one breaks every model.
    assert not (repository / "kernels" / "__init__.py").exists()
    assert {path.name for path in (repository / "kernels").glob("*/__init__.py")} == {"__init__.py"}


def test_a_model_runs_in_the_root_of_the_repository(in_root):
    assert in_root(LLAMA) == "(1, 3, 11)"


def test_a_model_runs_in_the_root_beside_the_kernels_of_hugging_face(in_root, tmp_path):
    (tmp_path / "kernels").mkdir()
    stand_in = (
        "__version__ = '0.18.2'\n"
        "class Named:\n"
        "    def __init__(self, *args, **named): pass\n"
        "    def __call__(self, *args, **named): return lambda f: f\n"
        "    def __getattr__(self, name): return Named()\n"
        "    def __or__(self, other): return self\n"
        "def __getattr__(name): return Named()\n"
    )
    (tmp_path / "kernels" / "__init__.py").write_text(stand_in)
    information = tmp_path / "kernels-0.18.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    code = f"import kernels; print(kernels.__version__)\n{LLAMA}"
    assert in_root(code, PYTHONPATH=str(tmp_path)).split("\n") == ["0.18.2", "(1, 3, 11)"]


def test_what_is_imported_is_declared(repository: Path, library):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = itertools.chain.from_iterable(project["optional-dependencies"].values())
    lines = [*project["dependencies"], *extras]
    declared = {re.match(r"[\w.-]+", line)[0].lower() for line in lines}
    ours = {"sae", "activations_cache", "sae_kernels", "monosema"}
    roots = {
        name.partition(".")[0]
        for source in library
        for node in ast.walk(source.tree)
        for name in named(node)
    }
    foreign = roots - ours - sys.stdlib_module_names
    assert {name for name in foreign if DISTRIBUTIONS.get(name, name) not in declared} == set()


def named(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def test_the_contracts_of_the_layers_are_kept(repository):
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


def module_of(path: str) -> str:
    return path.removeprefix("kernels/").removesuffix(".py").replace("/", ".")


def edges(library: list) -> dict[str, set[str]]:
    """Module -> what it imports of the project, inside functions and for type checkers too."""
    modules = {module_of(s.path): s for s in library if not s.path.endswith("__init__.py")}
    return {name: set(targets(source.tree)) & {*modules} for name, source in modules.items()}


def targets(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        yield from named(node)
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if there are none."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def test_no_module_imports_itself_by_way_of_others(library):
    assert circle(edges(library)) == []


def test_a_circle_is_found_wherever_the_import_stands():
    inside = ast.parse("def f():\n    from sae.b import g\n")
    typing = ast.parse("if TYPE_CHECKING:\n    from sae import a\n")
    graph = {"sae.a": {*targets(inside)} & {"sae.b"}, "sae.b": {*targets(typing)} & {"sae.a"}}
    assert set(circle(graph)) == {"sae.a", "sae.b"}
