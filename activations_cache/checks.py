"""Checks of config fields; each message begins with the field, so that its path can precede it.

What can go wrong with a cache on disk, each as its own class.

How long-running functions report where they are.
"""

import math
import re
from collections.abc import Callable

_PACKAGE_PATH = re.compile(r"package://\w+/.+", re.ASCII)


def require(holds: bool, field: str, rule: str, got: object) -> None:
    """Raise ValueError "<field> must <rule>, got <got>" unless the rule holds."""
    if not holds:
        raise ValueError(f"{field} must {rule}, got {got!r}")


def at_least(field: str, value: float | int, least: float | int) -> None:
    """Require a finite number that is at least `least`."""
    require(math.isfinite(value) and value >= least, field, f"be at least {least}", value)


def positive(field: str, value: float | int) -> None:
    """Require a finite number above 0."""
    require(math.isfinite(value) and value > 0, field, "be a positive number", value)


def fraction(field: str, value: float | int) -> None:
    """Require a number from 0 to 1."""
    require(math.isfinite(value) and 0 <= value <= 1, field, "lie between 0 and 1", value)


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


LATER = {"later": True}
"""Marks a key that came after caches and runs were made: at its default it is no part of what
tells requests apart."""


class CacheFormatError(ValueError):
    """A directory is not a cache, is unfinished, is damaged, or was made from something else."""


class CacheBusyError(RuntimeError):
    """Another live process is writing what this one wants to write."""


class DiskFullError(OSError):
    """There is not enough space; the message names the path, the need and what is free."""


class NonFiniteError(ValueError):
    """The model gives too many rows that are not finite, or that the cache's dtype cannot hold."""


class MissingPackageError(ValueError):
    """What was asked for needs a package that is not installed; the message says how to get it."""


Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, unit)`, for example `progress(3, 16, "contexts")`.

Behind " · " may stand what changes, and on further lines what is shown below, a line each.
"""


def silent(done: int, total: int, unit: str) -> None:
    """Report nothing; what a function uses when its caller passed no progress."""
