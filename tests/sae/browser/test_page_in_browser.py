"""The page in a real browser: no text runs, every text is shown exactly, and it can be used."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from sae.browser import PageData, ResultTable, write_page

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
MakePage = Callable[[str], PageData]

CALLS = ("canary()", "window['canary']()", "top.canary``", "&#99;anary()", "\\u0063anary()")
FORMS = (
    "<script>{}</script>",
    "</script><script>{}</script>",
    "</title><script>{}</script>",
    "</style><svg onload={}>",
    "<!--</script><script>{}//-->",
    "<img src=x onerror={}>",
    '"><img src=x onerror={}>',
    "'><svg/onload={}>",
    "<details open ontoggle={}>",
    '<iframe srcdoc="<script>{}</script>">',
    '<a href="javascript:{}">click</a>',
    "javascript:{}",
    "data:text/html,<script>{}</script>",
    "<body onload={}>",
    "<input autofocus onfocus={}>",
    "<video><source onerror={}></video>",
    "<math><mtext></p><script>{}</script>",
    "<style>@import 'javascript:{}'</style>",
    "<meta http-equiv=refresh content='0;url=javascript:{}'>",
    "<base href='javascript:{}//'>",
    '" onpointerover="{}" x="',
    "' autofocus onfocus='{}",
    '"}}]}};{}//',
    '\\"}};{}//',
    "${{{}}}",
    "{{{{constructor.constructor('{}')()}}}}",
    "`${{{}}}`",
    "]]><script>{}</script>",
    "\u2028{}\u2029",
    "\u202e<script>{}</script>\u202c",
    "\x00<scr\x00ipt>{}</script>",
    "<template><script>{}</script></template>",
)
PAYLOADS = [form.format(call) for form, call in itertools.product(FORMS, CALLS)] + [
    "__proto__",
    "constructor",
    "\ud800 lone \udfff",
    "\u2066\u202eabc\ufeff\u200f",
    "\t\x1b[31m\x85\r\n",
    "#topk/2",
    "%3Cscript%3E%",
]
GUARD = "window.ran = 0; window.canary = () => { window.ran += 1; }; window.alert = window.canary;"
# What a reader does, hovering and searching, and then what stands on the page.
TOUR = """(() => {
  const fire = (node, type) => node.dispatchEvent(new PointerEvent(type, {bubbles: true}));
  const seen = [];
  for (const token of document.querySelectorAll('.token')) {
    fire(token, 'pointerover');
    seen.push(document.querySelector('#tip .kept').textContent);
  }
  for (const bar of document.querySelectorAll('.column, .bar-area')) fire(bar, 'pointermove');
  for (const chart of document.querySelectorAll('#training figure svg')) fire(chart, 'pointermove');
  const search = document.querySelector('input');
  search.value = document.title;
  search.dispatchEvent(new Event('input'));
  return {
    seen,
    ran: window.ran,
    strangers: document.querySelectorAll('img, iframe, base, video, math').length,
    scripts: document.querySelectorAll('script').length,
    title: document.querySelector('h1').textContent,
    facts: [...document.querySelectorAll('.facts dt, .facts dd')].map(n => n.textContent),
    caution: document.querySelector('.caution').textContent,
    cells: [...document.querySelectorAll('table bdi')].map(n => n.textContent),
    legend: document.querySelector('.legend li').textContent,
    metric: document.querySelector('#training figcaption').textContent,
    steering: document.querySelector('.steering h3').textContent,
    base: document.querySelector('.base .reading').textContent,
    names: [...document.querySelectorAll('.switch button')].map(n => n.textContent),
    label: document.querySelector('.latent h3').textContent,
    source: document.querySelector('.source').textContent,
  };
})()"""


def test_there_are_enough_payloads() -> None:
    assert len(set(PAYLOADS)) >= 150


def test_no_payload_runs_and_every_text_is_shown_exactly(
    chromium: Any, make_page: MakePage, tmp_path: Path
) -> None:
    chromium.call("Page.addScriptToEvaluateOnNewDocument", source=GUARD)
    for payload in PAYLOADS:
        path = write_page(make_page(payload), tmp_path / "page.html")
        chromium.open(path.as_uri())
        result = chromium.run(TOUR)
        assert result["ran"] == result["strangers"] == 0, payload
        assert result["scripts"] == 2, payload
        for field in ("title", "caution", "legend", "metric", "steering", "label"):
            assert result[field] == payload, field
        assert result["base"] == payload * 2
        assert result["facts"] == [payload, payload]
        assert result["cells"] == [payload, "FVU", payload, "0.25", "other", payload]
        assert result["names"] == [payload, "relu"]
        assert result["source"] == f"book of {payload}"
        assert "".join(result["seen"]).startswith("It is a ")
        assert _complaints(chromium) == []


def _complaints(chromium: Any) -> list[Any]:
    bad = ("Log.entryAdded", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")
    return [event for event in chromium.events if event.get("method") in bad]


@pytest.mark.parametrize("name", ["topk", "a/b c", "50 % <b>", "__proto__", "Ünïcode/7", "#x"])
def test_a_deep_link_opens_its_latent(
    name: str, chromium: Any, make_page: MakePage, tmp_path: Path
) -> None:
    path = write_page(make_page(name), tmp_path / "page.html")
    chromium.open(f"{path.as_uri()}#{quote(name, safe='')}/5")
    assert chromium.run("document.querySelector('.latent h3').textContent") == "river"
    assert chromium.run("scrollY") > 0


@pytest.mark.parametrize(
    "address",
    [
        "#",
        "#/",
        "#//",
        "#topk/",
        "#topk/x",
        "#topk/-1",
        "#topk/1e3",
        "#%E0%A4%A/2",
        "#nothing/2",
        "#topk/99999999999999999999",
        "#javascript:canary()/2",
        "#<img src=x onerror=canary()>/2",
        "#__proto__/2",
        "#constructor/2",
        "#results",
        f"#{'a/' * 5000}2",
    ],
)
def test_any_other_address_shows_the_first_latent(
    address: str, chromium: Any, make_page: MakePage, tmp_path: Path
) -> None:
    chromium.call("Page.addScriptToEvaluateOnNewDocument", source=GUARD)
    path = write_page(make_page("topk"), tmp_path / "page.html")
    chromium.open(path.as_uri() + address)
    assert chromium.run("document.querySelector('.latent h3').textContent") == "topk"
    assert chromium.run("window.ran") == 0
    assert _complaints(chromium) == []


def test_a_latent_that_is_not_there_is_named(
    chromium: Any, make_page: MakePage, tmp_path: Path
) -> None:
    path = write_page(make_page("topk"), tmp_path / "page.html")
    chromium.open(path.as_uri() + "#topk/17")
    notice = chromium.run("document.querySelector('#latents .notice').textContent")
    assert notice == "This page has no latent 17 of topk."


def test_the_keyboard_goes_through_the_list_and_the_address_follows(
    chromium: Any, make_page: MakePage, tmp_path: Path
) -> None:
    path = write_page(make_page("topk"), tmp_path / "page.html")
    chromium.open(path.as_uri())
    chromium.run("document.querySelector('.list').focus()")
    label = "document.querySelector('.latent h3').textContent"
    for key, expected in (("ArrowDown", "river"), ("End", "music"), ("ArrowUp", "river")):
        chromium.press(key)
        assert chromium.run(label) == expected
    chosen = (
        "document.getElementById(document.querySelector('.list').ariaActiveDescendantElement.id)"
    )
    assert "river" in chromium.run(f"{chosen}.textContent")
    chromium.run("new Promise(done => setTimeout(done, 400))")
    assert chromium.run("location.hash") == "#topk/5"


def test_search_finds_by_label_word_token_and_number(
    chromium: Any, make_page: MakePage, tmp_path: Path
) -> None:
    path = write_page(make_page("topk"), tmp_path / "page.html")
    chromium.open(path.as_uri())
    for query, labels in (
        ("RIVER", ["river"]),
        ("8", ["music"]),
        ("#5", ["river"]),
        ("other", ["topk", "river", "music"]),
        ("river word", ["river"]),
        ("zzz", []),
    ):
        chromium.run(
            f"document.querySelector('input').value = {json.dumps(query)};"
            "document.querySelector('input').dispatchEvent(new Event('input'))"
        )
        found = "[...document.querySelectorAll('.line-label')].map(n => n.textContent)"
        assert chromium.run(found) == labels, query
    assert "No latent matches." in chromium.run("document.querySelector('.list').textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 1024, 380, 320])
def test_nothing_overflows_and_nothing_is_loaded(
    scheme: str, width: int, chromium: Any, make_page: MakePage, tmp_path: Path
) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chromium.call("Emulation.setEmulatedMedia", features=features)
    chromium.size(width, 800)
    path = write_page(make_page("averylongwordwithoutanyspace" * 9), tmp_path / "page.html")
    chromium.open(path.as_uri())
    assert chromium.run("document.documentElement.scrollWidth") <= width
    sent = [e for e in chromium.events if e.get("method") == "Network.requestWillBeSent"]
    assert {event["params"]["request"]["url"] for event in sent} <= {path.as_uri()}


def test_a_long_list_keeps_few_rows_in_the_page(
    chromium: Any, make_page: MakePage, tmp_path: Path
) -> None:
    page = make_page("topk")
    first = page.dictionaries[0]
    latents = tuple(replace(first.latents[0], latent=i, label=f"label {i}") for i in range(4999))
    many = replace(first, d_sae=4999, n_live=4999, n_dead=0, latents=latents)
    path = write_page(replace(page, dictionaries=(many,)), tmp_path / "page.html")
    chromium.open(path.as_uri() + "#topk/4998")
    assert chromium.run("document.querySelectorAll('.option').length") < 40
    assert (
        chromium.run("document.querySelector('.option[aria-selected=true]').textContent").find(
            "label 4998"
        )
        == 0
    )


def test_an_empty_page_says_so(chromium: Any, tmp_path: Path) -> None:
    empty = PageData("t", "", (), ResultTable((), (), ""), (), (), (), ())
    chromium.open(write_page(empty, tmp_path / "page.html").as_uri())
    said = chromium.run("[...document.querySelectorAll('.empty')].map(n => n.textContent)")
    assert said == [
        "This run recorded no results.",
        "This run recorded no training curves.",
        "This run has no steering example.",
        "This run made no dictionary.",
    ]
    assert _complaints(chromium) == []


def test_a_dictionary_and_a_latent_without_anything_say_so(
    chromium: Any, make_page: MakePage, tmp_path: Path
) -> None:
    page = make_page("topk")
    dead = replace(
        page.dictionaries[0].latents[0],
        **dict.fromkeys(("words", "promoted", "suppressed", "contexts", "histogram"), ()),
        **dict.fromkeys(("auc", "auc_low", "auc_high")),
        status="insufficient",
        density=0.0,
        max_activation=0.0,
        label="",
    )
    first, second = page.dictionaries
    pages = (replace(first, latents=(dead,)), replace(second, latents=()))
    path = write_page(replace(page, dictionaries=pages), tmp_path / "page.html")
    chromium.open(path.as_uri())
    said = chromium.run("document.querySelector('.latent').textContent")
    for text in (
        "(no label)",
        "Not scored",
        "never fired",
        "No word stands out",
        "None was recorded",
    ):
        assert text in said
    chromium.run("document.querySelectorAll('.switch button')[1].click()")
    said = chromium.run("document.querySelector('.detail').textContent")
    assert "This dictionary has no latents to show." in said
    assert _complaints(chromium) == []
