"""The parts of the site that are written elsewhere: examples, texts of the source tree, docstrings.

MkDocs calls the functions `on_*`. Pages link to each other as files of the repository, so that they
can be read there as well; here such links are turned to the pages that the files have become.
"""

import ast
import contextlib
import io
import json
import os
import posixpath
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

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


EXECUTED = (
    "train_on_a_model", "gemma_scope_and_steer", "explain_and_browse", "similarity",
    "concepts", "images_with_words",
)  # fmt: skip
"""Tutorials that the site shows with what their cells print and show; others show code alone."""

FRAMED = re.compile(r'src="http://127\.0\.0\.1:\d+/"')
"""A browser that was served while its cell ran."""


NOTE = re.compile(r"<div><small>.*?</small></div>")


class Output(NamedTuple):
    """What a cell printed, and what its last value shows, as HTML if it has any."""

    printed: str
    shown: str
    is_html: bool


class Cell(NamedTuple):
    """A cell of a tutorial: its text, its code, and what came of it if it was run."""

    text: str
    code: str
    output: Output | None = None


DOWNLOAD = (
    '\n<p><a href="../{name}.ipynb" download>This page as a notebook</a>, to be run in the folder '
    "<code>examples</code> of a checkout.</p>\n"
)

_notebooks: dict[str, dict[str, Any]] = {}
"""By the tutorial's name."""

_pages_of_cells: dict[str, Path] = {}
"""Folders that a tutorial's frame shows, by its name; they go into the site."""


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
    for source, page in _tutorials():
        script, name = source.read_text(), source.stem
        if name not in EXECUTED:
            made[page] = tutorial(script)
            continue
        with tempfile.TemporaryDirectory() as work:
            cells = executed(script, Path(work))
            _keep_pages(name, Path(work))
        made[page] = tutorial(script, cells) + DOWNLOAD.format(name=name)
        _notebooks[name] = notebook(script, cells)
    made |= dict(api_pages())
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_post_build(*, config: Any) -> None:
    """Put the notebooks, and the pages that their frames show, beside the tutorials."""
    folder = Path(config.site_dir) / "tutorials"
    for name, made in _notebooks.items():
        (folder / f"{name}.ipynb").write_text(json.dumps(made, indent=1))
    for name, pages in _pages_of_cells.items():
        shutil.copytree(pages, folder / name / "browse", dirs_exist_ok=True)
        shutil.rmtree(pages.parent)


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
        at_site = pages.get(target)
        if at_site is None and target.startswith("docs/") and (ROOT / target).is_file():
            at_site = target.removeprefix("docs/")  # a picture
        if at_site is not None:
            way = posixpath.relpath(at_site, posixpath.dirname(page) or ".")
            return f"{name}({way}{anchor or ''})"
        elsewhere = not target.startswith("docs/") and (ROOT / target).exists()
        return name[1:-1] if elsewhere else match[0]  # MkDocs says what leads nowhere

    return LINK.sub(turn, markdown)


def _keep_pages(name: str, work: Path) -> None:
    """Keep the feature browser that a tutorial wrote, if it did, until the site is built."""
    for page in work.rglob("browse/index.html"):
        kept = Path(tempfile.mkdtemp()) / "browse"
        _pages_of_cells[name] = Path(shutil.copytree(page.parent, kept))


def cells_of(script: str) -> list[Cell]:
    """The cells of a script, which begin by `# %%`: comments first are text, the rest is code."""
    results = []
    for cell in re.split(r"^# %%.*\n", script, flags=re.MULTILINE)[1:]:
        lines = cell.strip("\n").split("\n")
        code = next(i for i, line in enumerate([*lines, ""]) if not line.startswith("#"))
        text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:code])
        results.append(Cell(text, "\n".join(lines[code:]).strip("\n")))
    return results


def executed(script: str, work: Path) -> list[Cell]:
    """Run a script's cells in order, as a notebook does, and return them with what they show.

    Args:
        script: It is called without arguments.
        work: The working directory meanwhile.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    before, arguments, sys.argv = Path.cwd(), sys.argv, ["tutorial"]
    sys.path.insert(0, str(ROOT / "examples"))
    os.chdir(work)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return [cell._replace(output=_run(cell.code, names)) for cell in cells_of(script)]
    finally:
        os.chdir(before)
        sys.path.remove(str(ROOT / "examples"))
        sys.argv = arguments
        for value in names.values():
            if hasattr(value, "close") and hasattr(value, "_repr_html_"):
                value.close()


def _run(code: str, names: dict[str, Any]) -> Output:
    """Run one cell; its last expression, if it ends by one, is its value."""
    tree, value = ast.parse(code), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    is_html = hasattr(value, "_repr_html_")
    shown = value._repr_html_() if is_html else "" if value is None else repr(value)
    return Output(printed.getvalue(), shown, is_html)


def tutorial(script: str, cells: list[Cell] | None = None) -> str:
    """A script as a page: its docstring, and its cells, with what they show if they were run."""
    head = script.partition("\n# %%")[0]
    title, _, text = (ast.get_docstring(ast.parse(head)) or "").partition("\n")
    parts = [f"# {title.rstrip('.')}", text.strip("\n")]
    for cell in cells or cells_of(script):
        parts += [cell.text, f"```python\n{cell.code}\n```" if cell.code else ""]
        if cell.output is not None:
            parts += _as_page(cell.output)
    return "\n\n".join(part for part in parts if part) + "\n"


def _as_page(output: Output) -> list[str]:
    shown = output.shown
    if FRAMED.search(shown):  # the server is gone, and its address with it; the pages are here
        shown = FRAMED.sub('src="browse/index.html"', NOTE.sub("", shown))
    if not output.is_html and shown:
        shown = f"```\n{shown}\n```"
    printed = f"```\n{output.printed.rstrip()}\n```" if output.printed.strip() else ""
    return [printed, shown]


def notebook(script: str, cells: list[Cell]) -> dict[str, Any]:
    """The same as a notebook of Jupyter (nbformat 4.5), with the outputs in it."""
    title = (ast.get_docstring(ast.parse(script)) or "").replace("\n", "\n\n", 1)
    texts = [Cell(f"# {title}", ""), *cells]
    made: list[dict[str, Any]] = []
    for cell in texts:
        if cell.text:
            made.append({"cell_type": "markdown", "metadata": {}, "source": cell.text})
        if cell.code:
            outputs = [] if cell.output is None else _as_outputs(cell.output)
            code = {"cell_type": "code", "metadata": {}, "execution_count": None}
            made.append({**code, "source": cell.code, "outputs": outputs})
    for number, cell in enumerate(made):
        cell["id"] = f"cell-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": made}


def _as_outputs(output: Output) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    if output.printed:
        results.append({"output_type": "stream", "name": "stdout", "text": output.printed})
    if output.shown and not FRAMED.search(output.shown):  # what was served is gone
        kind = "text/html" if output.is_html else "text/plain"
        data = {"output_type": "display_data", "metadata": {}, "data": {kind: output.shown}}
        results.append(data)
    return results


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
