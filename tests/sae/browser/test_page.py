"""The written file: nothing of the data can leave its block, and nothing is lost in it."""

import base64
import hashlib
import html
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.browser import Context, Curve, PageData, ResultTable, write_page
from sae.browser.page import SCRIPTS, render_page
from sae.browser.page_json import page_json

MakePage = Callable[[str], PageData]
Read = Callable[[Path], dict[str, Any]]
EVIL = (
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]>\"'&amp;&#60;",
    "\u2028\u2029\u202eevil\u2066\u200f\ufeff",
    "\x00\x01\x1b\x7f\x85\r\n\t",
    "$data ${script} $$ {{title}} \\u003c",
    "\ud800 alone \udfff",
    "__proto__",
    "日本語 العربية 🎼",
)


def _texts(value: Any) -> set[str]:
    """Every string in a JSON value, keys left out."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, dict):
        return set().union(*map(_texts, value.values()))
    return set().union(*map(_texts, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("text", EVIL)
def test_every_text_comes_back_exactly(
    text: str, make_page: MakePage, read_data: Read, tmp_path: Path
) -> None:
    page = make_page(text)
    data = read_data(write_page(page, tmp_path / "page.html"))
    assert (data["title"], data["subtitle"]) == (text, text)
    assert data["facts"] == [[text, text]]
    assert data["cautions"] == [text]
    assert data["results"] == {
        "columns": [text, "FVU"],
        "rows": [[text, "0.25"], ["other", text]],
        "note": text,
    }
    assert data["curves"] == [
        {"name": text, "steps": [7, 11, 13], "values": {text: [0.5, 0.25, 0.125]}}
    ]
    steered = dict.fromkeys(("dictionary", "label", "prompt", "base", "steered", "unit"), text)
    assert data["steering"] == [{**steered, "latent": 2, "strength": 8.0}]
    first = data["dictionaries"][0]
    assert (first["name"], first["summary"]) == (text, f"the dictionary {text}")
    assert first["latents"]["label"] == [text, "river", "music"]
    assert first["latents"]["words"][0] == [[text, 4.5], ["other", 1.25]]
    promoted = [data["strings"][i] for i in first["latents"]["promoted"][0]]
    assert promoted == [f" {text}", "s"]
    context = first["latents"]["contexts"][0][0]
    assert context["tokens"] == ("It", " is", " a", f" {text}", "\n")
    assert context["source"] == f"book of {text}"


@given(st.text(st.characters(), max_size=40))
def test_no_text_can_leave_the_data_block(text: str) -> None:
    page = PageData("t", text, ((text, text),), _no_results(), (), (), (), (text,))
    written = page_json(page)
    assert not set(written) & set("<>&\u2028\u2029\u202e\x00\r\n")
    written.encode("utf-8")
    assert json.loads(written)["cautions"] == [text]


def _no_results() -> ResultTable:
    return ResultTable((), (), "")


def test_numbers_come_back(make_page: MakePage, read_data: Read, tmp_path: Path) -> None:
    page = make_page("x y")
    data = read_data(write_page(page, tmp_path / "page.html"))
    dictionary = data["dictionaries"][0]
    assert {key: dictionary[key] for key in ("d_sae", "n_rows", "n_live", "n_dead")} == {
        "d_sae": 23,
        "n_rows": 1009,
        "n_live": 19,
        "n_dead": 4,
    }
    assert dictionary["density_histogram"] == {
        "edges": [-4.0, -3.0, -2.0, -1.0],
        "counts": [5, 11, 3],
        "log10": True,
    }
    columns = dictionary["latents"]
    assert columns["latent"] == [2, 5, 8]
    for name in ("auc", "auc_low", "auc_high", "density", "max_activation", "kind", "status"):
        assert columns[name] == [getattr(latent, name) for latent in page.dictionaries[0].latents]
    assert columns["histogram"] == [[7, 3, 0, 1]] * 3


def test_activations_are_kept_to_half_a_255th_and_what_fires_stays_visible(
    make_page: MakePage, read_data: Read, tmp_path: Path
) -> None:
    data = read_data(write_page(make_page("x"), tmp_path / "page.html"))
    read = data["dictionaries"][0]["latents"]["contexts"][0][0]["activations"]
    assert read == pytest.approx((0.0, 8 / 255, 0.0, 8.0, 2.0), abs=8.0 / 510)
    assert read[0] == 0.0
    assert read[1] == pytest.approx(8 / 255)  # 0.001 would round to nothing


def test_a_context_may_be_stronger_than_the_recorded_maximum(
    make_page: MakePage, read_data: Read, tmp_path: Path
) -> None:
    page = make_page("x")
    dictionary = page.dictionaries[0]
    strong = Context(("a", "b"), (16.0, 8.0), 0, "")
    latent = replace(dictionary.latents[0], contexts=(strong,))
    page = replace(page, dictionaries=(replace(dictionary, latents=(latent,)),))
    columns = read_data(write_page(page, tmp_path / "page.html"))["dictionaries"][0]["latents"]
    assert columns["scale"] == [16.0]
    assert columns["contexts"][0][0]["activations"] == pytest.approx((16.0, 8.0), abs=16.0 / 510)


def test_many_different_tokens_are_numbered_right(
    make_page: MakePage, read_data: Read, tmp_path: Path
) -> None:
    # More than 2 ** 14 tokens, so that indices of one, two and three bytes are all used.
    tokens = tuple(f"t{i}" for i in range(16411))
    context = Context(tokens, (1.0,) * len(tokens), 7, "s")
    page = make_page("x")
    dictionary = page.dictionaries[0]
    latent = replace(dictionary.latents[0], contexts=(context,))
    page = replace(page, dictionaries=(replace(dictionary, latents=(latent,)),))
    data = read_data(write_page(page, tmp_path / "page.html"))
    assert data["dictionaries"][0]["latents"]["contexts"][0][0]["tokens"] == tokens


def test_values_that_are_not_finite_are_gaps(make_page: MakePage) -> None:
    curve = Curve("topk", (1, 2, 3), {"FVU": (math.nan, math.inf, 0.5)})
    data = json.loads(page_json(replace(make_page("x"), curves=(curve,))))
    assert data["curves"][0]["values"]["FVU"] == [None, None, 0.5]


def test_an_empty_page_can_be_written(read_data: Read, tmp_path: Path) -> None:
    data = read_data(
        write_page(PageData("t", "", (), _no_results(), (), (), (), ()), tmp_path / "p.html")
    )
    assert data["dictionaries"] == data["curves"] == data["steering"] == []


# ---- the file


def test_the_policy_allows_exactly_the_inlined_style_and_script(make_page: MakePage) -> None:
    text = render_page(make_page("$style </style> <script>"))
    policy = html.unescape(_only(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text))
    script = _only(r'<script type="module">(.*?)</script>', text)
    style = _only(r"<style>(.*?)</style>", text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "script-src": f"'{_sha256(script)}'",
        "style-src": f"'{_sha256(style)}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def _only(pattern: str, text: str) -> str:
    (found,) = re.findall(pattern, text, re.DOTALL)
    return found


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_the_title_is_escaped_outside_the_data_too(make_page: MakePage) -> None:
    text = render_page(make_page("</title><script>alert(1)</script>"))
    title = "&lt;/title&gt;&lt;script&gt;alert(1)&lt;/script&gt;"
    assert f"<title>{title}</title>" in text
    assert text.count("<script") == text.count("</script") == 2


def _source(name: str) -> str:
    return resources.files("sae.browser").joinpath(name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_never_read_text_as_markup_or_as_code(name: str) -> None:
    banned = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\.html\(|createContextualFragment"
        r"|DOMParser|setHTML|\beval\(|new Function|srcdoc|\bimport\b|fetch\(|XMLHttpRequest"
        r"|</script|<!--"
    )
    assert re.findall(banned, _source(name)) == []


@pytest.mark.parametrize("name", [*SCRIPTS, "page.css", "page.html"])
def test_sources_are_small_plain_and_name_no_address(name: str) -> None:
    text = _source(name)
    assert "\r" not in text
    assert set(re.findall(r"https?://[^\"' ]*", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"url\(|@import|<link|src=", text)
    assert len(text.splitlines()) <= 310


# ---- writing


def test_missing_folders_are_made_and_nothing_else_is_left(
    make_page: MakePage, tmp_path: Path
) -> None:
    path = tmp_path / "runs" / "one" / "page.html"
    assert write_page(make_page("x"), str(path)) == path
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_older_page(
    make_page: MakePage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_page(make_page("older"), tmp_path / "page.html")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_page(make_page("newer"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_data_gives_the_same_file(make_page: MakePage, tmp_path: Path) -> None:
    first = write_page(make_page("x"), tmp_path / "a.html").read_bytes()
    assert write_page(make_page("x"), tmp_path / "b.html").read_bytes() == first


def test_a_large_page_stays_small(make_page: MakePage, tmp_path: Path) -> None:
    """A ninth of 2 dictionaries x 4608 latents x 5 contexts x 32 tokens, which may take 12 MB."""
    draw = random.Random(0)
    vocabulary = [f" token{i}" for i in range(30011)]
    page = make_page("x")
    template = page.dictionaries[0].latents[0]

    def context() -> Context:
        tokens = tuple(vocabulary[min(int(draw.paretovariate(0.35)), 30010)] for _ in range(32))
        lit = [draw.random() * 8 if draw.random() < 0.25 else 0.0 for _ in range(32)]
        return Context(tokens, tuple(lit), 16, "a book")

    latents = tuple(
        replace(
            template,
            latent=i,
            label=f"the word “{draw.choice(vocabulary)}” and words like it",
            words=tuple((draw.choice(vocabulary), draw.random()) for _ in range(10)),
            promoted=tuple(draw.choices(vocabulary, k=10)),
            suppressed=tuple(draw.choices(vocabulary, k=10)),
            contexts=tuple(context() for _ in range(5)),
            histogram=tuple(draw.randrange(1000) for _ in range(20)),
        )
        for i in range(512)
    )
    dictionary = replace(page.dictionaries[0], d_sae=512, n_live=512, n_dead=0, latents=latents)
    pages = (dictionary, replace(dictionary, name="second"))
    path = write_page(replace(page, dictionaries=pages), tmp_path / "page.html")
    table = sum(len(token) + 3 for token in vocabulary)  # the table does not grow with the latents
    assert path.stat().st_size - table < 12e6 / 9
