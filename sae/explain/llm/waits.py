"""How long a busy service asks us to wait: seconds, milliseconds, dates, resets, words."""

import math
import re
import time
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)(?![a-z])", re.I)
_LONG_UNITS = (
    (re.compile(r"(?<=\d)\s*milliseconds?\b", re.I), "ms"),
    (re.compile(r"(?<=\d)\s*(seconds?|secs?)\b", re.I), "s"),
    (re.compile(r"(?<=\d)\s*(minutes?|mins?)\b", re.I), "m"),
    (re.compile(r"(?<=\d)\s*hours?\b", re.I), "h"),
)
_SAID = re.compile(
    r"(?:try again|retry|wait|retryDelay|reset)\W{0,4}(?:\w+ ){0,3}?(?:in|after|for)?\W{0,4}"
    r"((?:\d+(?:\.\d+)?\s*(?:ms|[smhd])(?![a-z])\s*)+)",
    re.I,
)
_KINDS = ("", "-requests", "-tokens", "-input-tokens", "-output-tokens")


def wanted_wait(headers: Mapping[str, str], words: str, now: float | None = None) -> float | None:
    """Seconds that a service asks to wait, or None.

    Args:
        headers: Of its answer; names in lower case or a mapping that does not mind.
        words: What it said.
        now: Seconds since 1970; the clock's when absent.
    """
    now = time.time() if now is None else now
    found = _milliseconds(headers.get("retry-after-ms"))
    if found is None:
        found = _until(headers.get("retry-after"), now)
    if found is None:
        found = _reset(headers, now)
    if found is None:
        for long, short in _LONG_UNITS:
            words = long.sub(short, words)
        said = _SAID.search(words)
        found = None if said is None else _duration(said[1])
    return None if found is None or math.isnan(found) else max(found, 0.0)


def _reset(headers: Mapping[str, str], now: float) -> float | None:
    """The reset of the limit that is used up; without such a one the latest of all."""
    used_up, others = [], []
    for prefix in ("x-ratelimit-", "ratelimit-", "anthropic-ratelimit-", "x-rate-limit-"):
        for kind in _KINDS:
            for reset, remaining in (
                (f"{prefix}reset{kind}", f"{prefix}remaining{kind}"),
                (f"{prefix}{kind[1:]}-reset", f"{prefix}{kind[1:]}-remaining"),
            ):
                wait = _until(headers.get(reset), now)
                if wait is not None:
                    left = (headers.get(remaining) or "").strip()
                    (used_up if left == "0" else others).append(wait)
    return max(used_up or others, default=None)


def _milliseconds(text: str | None) -> float | None:
    value = _number(text)
    return None if value is None else value / 1000


def _until(text: str | None, now: float) -> float | None:
    """Seconds, a moment since 1970 in seconds or milliseconds, a duration, or a date."""
    if text is None:
        return None
    value = _number(text)
    if value is not None:
        if value > 1e11:
            return value / 1000 - now
        return value - now if value > 1e9 else value
    found = _duration(text)
    if found is not None:
        return found
    try:
        return parsedate_to_datetime(text).timestamp() - now
    except (TypeError, ValueError, OverflowError):
        return _iso(text, now)


def _iso(text: str, now: float) -> float | None:
    try:
        return datetime.fromisoformat(text.strip().replace("Z", "+00:00")).timestamp() - now
    except (ValueError, OverflowError):
        return None


def _duration(text: str) -> float | None:
    """Seconds of a text such as 1m30.5s or 200ms."""
    parts = _DURATION.findall(text.strip())
    joined = "".join(number + unit for number, unit in parts)
    if not parts or joined.lower() != re.sub(r"\s", "", text).lower():
        return None
    return sum(float(number) * _UNITS[unit.lower()] for number, unit in parts)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
