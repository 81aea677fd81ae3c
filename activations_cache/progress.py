"""How long-running functions report where they are."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, unit)`, for example `progress(3, 16, "contexts")`.

Behind " · " may stand what changes, and on further lines what is shown below, a line each.
"""


def silent(done: int, total: int, unit: str) -> None:
    """Report nothing; what a function uses when its caller passed no progress."""
