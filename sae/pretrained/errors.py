"""What is raised for a dictionary that cannot be read."""


class DictionaryFormatError(ValueError):
    """A dictionary on disk that is missing, damaged or not what it says."""


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks, cut to 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
