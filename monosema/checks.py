"""Checks of config fields; each message begins with the field, so that its path can precede it.

How long-running functions report where they are.
"""

import math
from collections.abc import Callable


class MonosemaError(ValueError):
    """What a caller can cause; the message says what must be so, what is, and what to do.

    Every other ValueError is a fault of this program.
    """


class WrongClassError(MonosemaError, TypeError):
    """An argument is of another class than the function takes."""


MOST = 1 << 53
"""The largest count that is accepted: no machine holds more, and a float is exact up to here."""


def require(holds: bool, field: str, rule: str, got: object) -> None:
    """Raise MonosemaError "<field> must <rule>, got <got>" unless the rule holds."""
    if not holds:
        raise MonosemaError(f"{field} must {rule}, got {got!r}")


def at_least(field: str, value: float | int, least: float | int) -> None:
    """Require a finite number that is at least `least`; counts have an upper end as well."""
    is_count = isinstance(value, int) and not field.endswith("seed")
    require(not is_count or value <= MOST, field, f"be at most {MOST:,}", value)
    require(math.isfinite(value) and value >= least, field, f"be at least {least}", value)


def all_at_least(config: object, **least: float | int) -> None:
    """Require the same of several fields of a config, in their order."""
    for name, value in least.items():
        at_least(name, getattr(config, name), value)


def positive(field: str, value: float | int) -> None:
    """Require a finite number above 0."""
    require(math.isfinite(value) and value > 0, field, "be a positive number", value)


def fraction(field: str, value: float | int) -> None:
    """Require a number from 0 to 1."""
    require(math.isfinite(value) and 0 <= value <= 1, field, "lie between 0 and 1", value)


LATER = {"later": True}
"""Marks a key that came after caches and runs were made: at its default it is no part of what
tells requests apart."""


def formerly(name: str) -> dict[str, str]:
    """Mark a key that was renamed: files may have its former name, and identities have it."""
    return {"formerly": name}


Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, unit)`, for example `progress(3, 16, "contexts")`.

Behind " · " may stand what changes, and on further lines what is shown below, a line each.
"""


def silent(done: int, total: int, unit: str) -> None:
    """Report nothing; what a function uses when its caller passed no progress."""


LONGEST = 1000
"""Characters of a message: a hostile file must not fill the terminal."""


class DictionaryFormatError(MonosemaError):
    """A dictionary on disk that is missing, damaged or not what it says, said in one line."""

    def __init__(self, message: str) -> None:
        """Take a message, of which only what can be printed is kept."""
        super().__init__(printable(message, LONGEST))


def printable(text: str, longest: int) -> str:
    """Return a text in one line without control characters, its middle cut if it is too long."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return line if len(line) <= longest else f"{line[: longest // 2]} ... {line[-longest // 2 :]}"
