"""How long-running functions report where they are."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, unit)`, for example `progress(3, 16, "contexts")`."""


def silent(done: int, total: int, unit: str) -> None:
    """Report nothing; what a function uses when its caller passed no progress."""
