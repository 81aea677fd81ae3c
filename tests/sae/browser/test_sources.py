"""The front end's sources: no data can become markup or code, nothing is loaded from elsewhere."""

import re
from importlib import resources

import pytest

SOURCE = resources.files("sae.browser")
SCRIPTS = sorted(f.name for f in SOURCE.iterdir() if f.name.endswith(".js"))
STYLES = sorted(f.name for f in SOURCE.iterdir() if f.name.endswith(".css"))
ICON = "icon.svg"
BANNED = (
    r"(inner|outer)HTML",
    r"insertAdjacentHTML",
    r"document\.write",
    r"createContextualFragment",
    r"DOMParser",
    r"setHTML",
    r"srcdoc",
    r"\beval\b",
    r"new Function|\bFunction\(",
    r"set(Timeout|Interval)\(\s*[\"'`]",
    r"javascript:",
    r"\bimport\b\s*[({\"']",
    r"https?://(?!www\.w3\.org/2000/svg)",
)


def _code(name: str) -> str:
    """A script without its comments, which may speak of anything."""
    text = SOURCE.joinpath(name).read_text(encoding="utf-8")
    return re.sub(r"^\s*//.*$|/\*\*.*?\*/", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_makes_markup_or_code_of_a_text(name: str) -> None:
    assert [ban for ban in BANNED if re.search(ban, _code(name))] == []


@pytest.mark.parametrize("code", ["x.innerHTML = y", "eval(x)", "document.write(x)", "a.outerHTML"])
def test_the_bans_find_what_they_ban(code: str) -> None:
    assert any(re.search(ban, code) for ban in BANNED)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_strict_short_and_say_what_they_are(name: str) -> None:
    lines = SOURCE.joinpath(name).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("// ")
    assert '"use strict";' in lines[:6]
    assert len(lines) <= 300
    assert max(map(len, lines)) <= 115


@pytest.mark.parametrize("name", STYLES)
def test_styles_are_short_and_load_nothing(name: str) -> None:
    text = SOURCE.joinpath(name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 310
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_names_every_file_once_and_no_other() -> None:
    page = SOURCE.joinpath("index.html").read_text(encoding="utf-8")
    named = re.findall(r'(?:src|href)="assets/([^"]+)"', page)
    assert sorted(named) == sorted([*SCRIPTS, *STYLES, ICON])
    assert re.findall(r'src="(data/[^"]+)"', page) == ["data/index.js", "data/server.js"]
    assert " style=" not in page
    assert re.findall(r"\son\w+=", page) == []
    assert re.findall(r"<script[^>]*>[^<]", page) == []
