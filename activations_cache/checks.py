"""Checks of config fields that a cache alone needs, beside the common ones of `monosema.checks`.

What can go wrong with a cache on disk, each as its own class.
"""

import math
import re

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
