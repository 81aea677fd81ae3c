"""Packages that load nothing before a name of theirs is used."""

import ast
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path


def on_first_use(
    package: str, file: str
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package, for its `__init__.py`.

    The package's names are those of the imports in its `if TYPE_CHECKING:`, so that type checkers
    and readers see the same list.

    Args:
        package: Its `__name__`.
        file: Its `__file__`.
    """

    @cache
    def homes() -> dict[str, tuple[str, str]]:
        """Name -> the module that it comes from, and what it is called there."""
        results: dict[str, tuple[str, str]] = {}
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        for line in (line for part in tree.body if isinstance(part, ast.If) for line in part.body):
            match line:
                case ast.ImportFrom(module=str(module), names=names):
                    results |= {name.asname or name.name: (module, name.name) for name in names}
                case ast.Assign(targets=[ast.Name(id=public)], value=ast.Name(id=inner)):
                    results[public] = results.pop(inner)
                case _:
                    raise AssertionError(f"{file}: {ast.unparse(line)}")
        return results

    def get(name: str) -> object:
        if name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, inner = homes()[name]
        if module == package:
            return import_module(f"{package}.{inner}")
        return getattr(import_module(module), inner)

    return get, lambda: sorted(homes())
