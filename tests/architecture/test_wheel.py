"""What an installation gets."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGES = ("sae", "activations_cache", "kernels")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel that is built from a copy of the tree."""
    copy = tmp_path_factory.mktemp("wheel") / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in PACKAGES:
        shutil.copytree(repository / folder, copy / folder, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / file, copy / file)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(copy / "dist" / done.stdout.split()[-1]) as archive:
        return archive.namelist()


def test_the_wheel_brings_three_packages_and_no_folder_named_kernels(wheel):
    tops = {name.partition("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "sae",
        "activations_cache",
        "sae_kernels",
    }


def test_the_wheel_brings_every_source_file(wheel, library):
    expected = {source.path.removeprefix("kernels/") for source in library}
    assert expected - set(wheel) == set()


def test_the_wheel_brings_the_data(wheel, repository):
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
    assert len(data) > 3
    assert set(data) - set(wheel) == set()
    assert any(name.endswith(".dist-info/licenses/sae/demo_data/NOTICE") for name in wheel)
