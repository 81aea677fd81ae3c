"""What is raised for a dictionary that cannot be read."""

LONGEST = 1000
"""Characters of a message: a hostile file must not fill the terminal."""


class DictionaryFormatError(ValueError):
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
