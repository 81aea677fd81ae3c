"""The page of an evaluation: one HTML file without scripts that needs nothing beside it."""

import base64
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from activations_cache import io
from sae.browser import ResultTable
from sae.cli.sections import Section

STYLE = """
main { max-width: 1500px; }
section { margin-top: 2.2rem; }
.wide {
  overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.8rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--muted); font-weight: 550; font-size: 0.87rem; vertical-align: bottom; }
tbody tr { border-top: 1px solid var(--line); }
tbody th { font-weight: 550; }
img { max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 10px; }
"""


def write_page(
    path: Path, title: str, sections: Sequence[Section], picture: Path | None = None
) -> None:
    """Write the page.

    Args:
        path: The file.
        title: Of the page.
        sections: Its tables, in order.
        picture: A PNG to show above the second table.
    """
    shown = [_section(section) for section in sections]
    if picture is not None:
        shown.insert(1, _picture(picture))
    sheets = (files("sae.browser") / name for name in ("colours.css", "base.css"))
    style = "".join(sheet.read_text() for sheet in sheets) + STYLE
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{''.join(shown)}</main>\n</body>\n</html>\n"
    )
    io.write_files({path: text.encode()})


def _section(section: Section) -> str:
    return (
        f"<section>\n<h2>{escape(section.title)}</h2>\n{_table(section.table)}"
        f'<p class="note">{escape(section.table.note)}</p>\n</section>\n'
    )


def _table(table: ResultTable) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in table.rows
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>\n"
    )


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<section><img alt="figures against L0" src="data:image/png;base64,{data}"></section>\n'
