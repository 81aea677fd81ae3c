"""Checks that the parts of the browser's data share."""

import math
from collections.abc import Iterable, Sequence

from activations_cache.checks import require


def require_finite(field: str, values: Sequence[float | int]) -> None:
    """Refuse a value that is not finite or below 0."""
    if values and min(values) >= 0 and math.isfinite(sum(values)):
        return
    bad = next((value for value in values if not math.isfinite(value) or value < 0), None)
    require(bad is None, field, "be finite and at least 0", bad)


def require_numbers(field: str, values: Sequence[float | int]) -> None:
    """Refuse a value that is not finite."""
    bad = next((value for value in values if not math.isfinite(value)), None)
    require(bad is None, field, "be finite", bad)


def require_fraction(field: str, value: float | None) -> None:
    """Refuse what is no share."""
    require(value is None or 0 <= value <= 1, field, "lie between 0 and 1", value)


def require_unique(field: str, values: Iterable[object]) -> None:
    """Refuse what comes twice."""
    seen: set[object] = set()
    for value in values:
        require(value not in seen, field, "be unique", value)
        seen.add(value)


def require_length(field: str, values: Sequence[object], n: int, per: str) -> None:
    """Refuse a sequence that does not fit to another."""
    require(len(values) == n, field, f"have one value per {per} ({n})", len(values))
