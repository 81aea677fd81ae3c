"""The parts of the site that are written elsewhere: examples, texts of the source tree, docstrings.

MkDocs calls the functions `on_*`. Pages link to each other as files of the repository, so that they
can be read there as well; here such links are turned to the pages that the files have become.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {
    "README.md": "readme.md",
    "GLOSSARY.md": "glossary.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "activations_cache/FORMAT.md": "cache_format.md",
    "kernels/README.md": "kernels.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Files of the repository that become pages, and how the pages are called."""

SOURCES = ("activations_cache", "kernels/sae_kernels", "sae", "monosema")
LINK = re.compile(r"(!?\[[^\]]*\])\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
HIDDEN = ("sae/cli", "sae/demo_data")
"""Nothing to call from Python."""


def on_config(config: Any) -> Any:
    """Put what is made here into the navigation."""
    tutorials = [page for _, page in _tutorials()]
    more = {"About": ["glossary.md", "contributing.md", "benchmarks.md", "changelog.md"]}
    use = next(entry["In use"] for entry in config.nav if "In use" in entry)
    use += ["cache_format.md", "kernels.md"]
    config.nav.insert(1, {"Overview": "readme.md"})
    config.nav.insert(3, {"Tutorials": tutorials})
    config.nav += [{"API": [page for page, _ in api_pages()]}, more]
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages that are written elsewhere."""
    from mkdocs.structure.files import File

    made = {page: (ROOT / source).read_text() for source, page in TEXTS.items()}
    made |= {page: tutorial(source.read_text()) for source, page in _tutorials()}
    made |= dict(api_pages())
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn links to files of the repository to their pages."""
    return relinked(markdown, page.file.src_uri)


def relinked(markdown: str, page: str) -> str:
    """Links to pages, as seen from the page; what has no page is named without a link."""
    pages = _pages()
    source_of_page = next(
        (source for source, name in pages.items() if name == page), f"docs/{page}"
    )

    def turn(match: re.Match[str]) -> str:
        name, path, anchor = match.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source_of_page), path))
        if target in pages:
            way = posixpath.relpath(pages[target], posixpath.dirname(page) or ".")
            return f"{name}({way}{anchor or ''})"
        elsewhere = not target.startswith("docs/") and (ROOT / target).exists()
        return name[1:-1] if elsewhere else match[0]  # MkDocs says what leads nowhere

    return LINK.sub(turn, markdown)


def tutorial(script: str) -> str:
    """A script as a page: its docstring, and cells that begin by `# %%`."""
    head, *cells = re.split(r"^# %%.*\n", script, flags=re.MULTILINE)
    title, _, text = (ast.get_docstring(ast.parse(head)) or "").partition("\n")
    parts = [f"# {title.rstrip('.')}", text.strip()]
    for cell in cells:
        lines = cell.strip("\n").split("\n")
        code = next(i for i, line in enumerate([*lines, ""]) if not line.startswith("#"))
        parts.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:code]))
        if body := "\n".join(lines[code:]).strip("\n"):
            parts.append(f"```python\n{body}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def api_pages() -> list[tuple[str, str]]:
    """A page for each package, with the docstrings of all its public modules."""
    packages = sorted(
        path.parent
        for source in SOURCES
        for path in (ROOT / source).rglob("__init__.py")
        if not str(path.relative_to(ROOT)).startswith(HIDDEN)
    )
    return [(f"reference/{_dotted(package)}.md", _api_page(package)) for package in packages]


def _api_page(package: Path) -> str:
    names = sorted(path.stem for path in package.glob("*.py") if not path.stem.startswith("_"))
    summary = (ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or "").strip()
    modules = "\n\n".join(f"::: {_dotted(package)}.{name}" for name in names)
    return f"# {_dotted(package)}\n\n{summary}\n\n{modules}\n"


def _dotted(package: Path) -> str:
    return str(package.relative_to(ROOT)).removeprefix("kernels/").replace("/", ".")


def _tutorials() -> list[tuple[Path, str]]:
    return [
        (path, f"tutorials/{path.stem}.md") for path in sorted((ROOT / "examples").glob("*.py"))
    ]


def _pages() -> dict[str, str]:
    """Every file of the repository that has a page."""
    pages_here = {f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md")}
    tutorials = {str(path.relative_to(ROOT)): page for path, page in _tutorials()}
    return {**TEXTS, **pages_here, **tutorials}
