"""Reading a model's answers: a label or a list of numbers, or CallFailedError; never a guess."""

import json
import math
import re
from collections.abc import Callable

from sae.explain.llm.chat import CallFailedError
from sae.explain.llm.corpus_text import as_label

_LABEL = re.compile(r"^[\s*_#>]*(?:\[EXPLANATION\]|EXPLANATION|LABEL)[\s*_]*:[\s*_]*(\S.*)$", re.I)
_LIST = re.compile(r"\[[^\[\]]*\]")
_REFUSAL = re.compile(r"^\W*(i'?m sorry|i am sorry|i can'?t|i cannot|i'?m unable|as an ai)", re.I)
_NO_LABEL = {"none", "n/a", "null", "unknown", "...", "<label>", "[label]"}


def read_label(text: str) -> str:
    """The label on the last line of the form `LABEL: ...`.

    Raises:
        CallFailedError: With reason "refusal" or "parse", if there is none.
    """
    for line in reversed(text.splitlines()):
        match = _LABEL.match(line)
        label = as_label(match[1]).strip("* _\"'") if match else ""
        if label and label.lower() not in _NO_LABEL:
            return label
    raise _unreadable(text, "a line LABEL: ...")


def read_numbers(n: int, low: int, high: int) -> Callable[[str], list[float]]:
    """A reader of the last JSON list of exactly n numbers from low to high; true is 1, false 0."""

    def read(text: str) -> list[float]:
        for found in reversed(_LIST.findall(text)):
            numbers = _numbers(found)
            if len(numbers) == n and all(low <= number <= high for number in numbers):
                return numbers
        raise _unreadable(text, f"a list of {n} numbers from {low} to {high}")

    return read


def _numbers(found: str) -> list[float]:
    try:
        values = json.loads(found)
    except (ValueError, RecursionError):
        return []
    is_right = all(isinstance(value, int | float) for value in values)
    try:
        numbers = [float(value) for value in values] if is_right else []
    except OverflowError:
        return []
    return numbers if all(map(math.isfinite, numbers)) else []


def read_texts(n: int) -> Callable[[str], list[str]]:
    """A reader of the last JSON list of n texts or more; n of them are taken."""

    def read(text: str) -> list[str]:
        start, end = text.find("["), text.rfind("]")
        try:
            values = json.loads(text[start : end + 1]) if 0 <= start < end else []
        except (ValueError, RecursionError):
            values = []
        texts = [as_label(value) for value in values if isinstance(value, str) and value.strip()]
        if len(texts) < n:
            raise _unreadable(text, f"a list of {n} texts")
        return texts[:n]

    return read


def _unreadable(text: str, wanted: str) -> CallFailedError:
    if _REFUSAL.match(text):
        return CallFailedError("refusal", as_label(text)[:100])
    return CallFailedError("parse", f"the answer must have {wanted}, got {as_label(text)[:100]!r}")
