"""Write the result page of a run: one HTML file with its style, script and data inside.

The page asks nothing of any server. Its content security policy allows exactly the style and the
script that were inlined, by their SHA-256, and nothing else, so no text of the data can run.
"""

import base64
import hashlib
import html
import os
from importlib import resources
from pathlib import Path
from string import Template

from sae.browser.page_data import PageData
from sae.browser.page_json import page_json

SCRIPTS = (
    "page_dom.js",
    "page_charts.js",
    "page_report.js",
    "page_list.js",
    "page_latent.js",
    "page_browser.js",
    "page.js",
)


def write_page(data: PageData, path: str | os.PathLike[str]) -> Path:
    """Write the result page of a run as one self-contained HTML file.

    The file appears whole or not at all: it is written under a temporary name beside `path` and
    renamed. Missing folders are made.

    Args:
        data: what the page shows.
        path: the file to write, such as "runs/demo/index.html".

    Returns:
        The path of the file.
    """
    target = Path(path)
    text = render_page(data)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        # A lone surrogate in the title has no UTF-8; elsewhere page_json has escaped it.
        with temporary.open(
            "w", encoding="utf-8", errors="xmlcharrefreplace", newline="\n"
        ) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def render_page(data: PageData) -> str:
    """The text of the result page."""
    style = _source("page.css")
    script = "\n".join(_source(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # One pass: what is put in is not searched for places again.
    return Template(_source("page.html")).substitute(
        policy=html.escape(policy, quote=False),
        title=html.escape(data.title),
        style=style,
        script=script,
        data=page_json(data),
    )


def _source(name: str) -> str:
    return resources.files("sae.browser").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The content security policy's name for an inline text."""
    raw = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(raw).decode('ascii')}"
