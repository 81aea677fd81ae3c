"""The keys of a foreign config file, each read with its type.

What is raised for a dictionary that cannot be read.
"""

from collections.abc import Iterable, Mapping

from monosema.checks import MonosemaError

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


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks, cut to 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def needs_name(is_named: bool, format: str) -> None:
    """Refuse a top-k without ReLU unless the user named the format, and so accepts ours.

    Raises:
        DictionaryFormatError: If the format was not named.
    """
    if not is_named:
        raise DictionaryFormatError(
            "a top-k must cut negative values at 0, got one that keeps them among its k; they are "
            f"the same while k values are positive: name the format by format={format!r} to read "
            "it so"
        )


MOST = 1 << 28
"""No width of a dictionary is larger; products of two still fit into 64 bits."""
MAX = 1e30
"""Numbers beyond it have no place in fp32 weights."""
_REQUIRED = object()


class Fields:
    """A JSON object whose values are taken one by one; messages name the file and the key."""

    def __init__(self, record: Mapping[str, object], what: str) -> None:
        """Take the object and the name of what it is part of."""
        self.record, self.what = record, what

    def __contains__(self, key: str) -> bool:
        return self.record.get(key) is not None

    def only(self, known: Iterable[str]) -> None:
        """Refuse keys that are not known: one of them may change what the numbers mean."""
        if unknown := sorted(set(self.record) - set(known)):
            raise DictionaryFormatError(
                f"{self.what} must have known keys, got {unknown}; update monosema, or remove "
                "them if they do not change how the dictionary is applied"
            )

    def whole(self, key: str, default: object = _REQUIRED, least: int = 1) -> int:
        """A whole number."""
        value = self._value(key, default)
        if type(value) is not int or not least <= value <= MOST:
            self._refuse(key, f"be a whole number from {least} to {MOST:,}", value)
        assert isinstance(value, int)
        return value

    def number(self, key: str, default: object = _REQUIRED) -> float:
        """A number of moderate size."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not -MAX < value < MAX:
            self._refuse(key, f"be a number within {MAX:g}", value)
        assert isinstance(value, int | float)
        return float(value)

    def flag(self, key: str, default: object = _REQUIRED) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            self._refuse(key, "be true or false", value)
        return bool(value)

    def word(self, key: str, words: Iterable[str] = (), default: object = _REQUIRED) -> str:
        """A text, one of `words` if there are any."""
        value, words = self._value(key, default), tuple(words)
        if not isinstance(value, str) or (words and value not in words):
            self._refuse(key, f"be one of {list(words)}" if words else "be a text", value)
        return str(value)

    def part(self, key: str, default: object = _REQUIRED) -> "Fields":
        """An object inside this one."""
        value = self._value(key, default)
        if not isinstance(value, dict):
            self._refuse(key, "be an object", value)
        assert isinstance(value, dict)
        return Fields(value, f"{self.what}, {key}")

    def parts(self, key: str) -> list["Fields"]:
        """The objects in a list inside this one; none where it is absent."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            self._refuse(key, "be a list of objects", value)
        assert isinstance(value, list)
        return [Fields(entry, f"{self.what}, {key}") for entry in value]

    def texts(self, keys: Iterable[str]) -> dict[str, str]:
        """Those of the keys that are there, as text: notes for a reader."""
        return {key: printable(str(self.record[key]), 200) for key in keys if key in self}

    def _value(self, key: str, default: object) -> object:
        value = self.record.get(key)
        if value is None:
            value = default
        if value is _REQUIRED:
            raise DictionaryFormatError(f"{self.what} must have the key {key!r}, got none")
        return value

    def _refuse(self, key: str, rule: str, value: object) -> None:
        raise DictionaryFormatError(f"{key} must {rule} in {self.what}, got {value!r}")
