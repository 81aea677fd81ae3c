"""Texts that would be programs: none runs, and every one is shown as it is.

Each payload stands as token, document, label, run name, dictionary name, file name, word, note,
command and explanation, in a real browser that opens the folder from the disk.
"""

import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pictures

from sae.browser import (
    Curve,
    Dictionary,
    Example,
    Image,
    Latent,
    Map,
    PlaneMap,
    ResultTable,
    ShownAttribution,
    ShownExplanation,
    ShownScore,
    Site,
    SteeringExample,
    write_site,
)

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
LONG = (pytest.mark.long, pytest.mark.timeout(600))
# What a reader does, hovering over everything, and then what stands on the page.
LATENT = """(() => {
  const fire = (node, type) => node.dispatchEvent(new PointerEvent(type, {bubbles: true}));
  for (const node of document.querySelectorAll('.token, canvas, svg, img, button, .chip'))
    for (const type of ['pointerover', 'pointermove', 'pointerenter', 'focusin']) fire(node, type);
  const texts = (query) => [...document.querySelectorAll(query)].map(n => n.textContent);
  return {
    ran: window.ran,
    strangers: document.querySelectorAll(
      'main script, iframe, base, video, math, object, embed, main style, [onerror], [onload]'
    ).length,
    all: document.querySelector('#page').textContent,
    h1: texts('h1')[0],
    tokens: texts('.reading .token'),
    words: texts('.word'),
    command: texts('.command code')[0],
    explanation: texts('.explanation bdi')[0],
    title: document.title,
    alts: texts('figcaption').join(' '),
  };
})()"""


def visible(reader: Any, text: str) -> str:
    """What the browser shows in place of a text: the same, but for characters without a shape."""
    shown = reader.run(f"visible({json.dumps(text)})")
    if text.isprintable() and text.isascii():
        assert shown == text
    return shown


def picture() -> bytes:
    target = io.BytesIO()
    Pictures.new("RGB", (8, 8)).save(target, "JPEG")
    return target.getvalue()


def latent(number: int, text: str, is_picture: bool) -> Latent:
    image = Image(0, text, (1, 2), 8, 8) if is_picture else None
    words = () if is_picture else (text, " and", text)
    return Latent(
        number, "scored", 0.5, 2.0, 7, text, text,
        figures={"auc": 0.75},
        explanations=(ShownExplanation(text, text),),
        scores=(ShownScore(text, 0.75, note=text), ShownScore(text, 0.5, control=text)),
        words=((text, 1.0),), promoted=((text, 1.0),), suppressed=((text, None),),
        examples=(Example(words, (2.0, 0.0) if is_picture else (2.0, 0.0, 0.5), 0, text, image),),
        nearest=((number, 0.5),), cofiring=((number, 0.5, 7),),
        attributions=(ShownAttribution((text,), (1.0,), text, 1.0, text),), command=text,
    )  # fmt: skip


def site_of(payloads: Sequence[str], name: str) -> Site:
    """One latent per payload, of text and of pictures; the name stands wherever a run's does."""
    n = len(payloads)

    def dictionary(called: str, kind: Any) -> Dictionary:
        return Dictionary(
            called, name, n, 7, n, 0,
            tuple(latent(i, text, kind == "image") for i, text in enumerate(payloads)),
            kind=kind, facts=((name, name),),
            map=Map((PlaneMap(name, (0.5,) * n, (0.5,) * n, name),), (name,), (0,) * n),
        )  # fmt: skip

    return Site(
        name, name, ((name, name),), (dictionary(name, "text"), dictionary(name + " ", "image")),
        results=ResultTable((name, "FVU"), ((name, name),), name),
        curves=(Curve(name, (7, 11), {name: (0.5, 0.25)}),),
        steering=(SteeringExample(name, 0, name, 8.0, name, name, name, name),), cautions=(name,),
        pictures=((0, picture()),),
    )  # fmt: skip


@pytest.fixture(scope="module")
def guarded(reader: Any) -> Any:
    reader.call("Page.addScriptToEvaluateOnNewDocument", source=GUARD)
    return reader


def test_there_are_enough_payloads() -> None:
    assert len(set(PAYLOADS)) >= 150


def test_the_canary_would_be_heard(guarded: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<h1>x</h1><img src=x onerror=canary()><script>canary()</script>")
    guarded.open(page.as_uri())
    assert guarded.run("window.ran") >= 1


@pytest.mark.parametrize(
    ("dictionary", "every"),
    [("d0", 1), ("d1", 5), pytest.param("d1", 1, marks=LONG)],
    ids=["text", "some pictures", "all pictures"],
)
def test_no_latents_text_runs_and_each_is_shown(
    dictionary: str, every: int, guarded: Any, tmp_path: Path
) -> None:
    page = write_site(site_of(PAYLOADS, "a run"), tmp_path / "site")
    guarded.load(page, f"#{dictionary}/table")
    shown = guarded.run(f"{json.dumps(PAYLOADS)}.map(visible)")
    assert guarded.run("window.ran") == 0
    for number, expected in list(enumerate(shown))[::every]:
        payload = PAYLOADS[number]
        assert expected == payload or not payload.isprintable() or "\u2028" in payload, payload
        address = f"#{dictionary}/latent/{number}"
        guarded.run(f"goTo({json.dumps(address)})")
        guarded.settle(address)
        result = guarded.run(LATENT)
        assert result["ran"] == result["strangers"] == 0, payload
        assert result["h1"] == expected, payload
        assert result["explanation"] == result["command"] == expected, payload
        assert result["words"][0] == expected, payload
        if dictionary == "d1":
            assert f"{expected}" in result["alts"], payload
        else:
            texts = [token.removesuffix("\u200b") for token in result["tokens"]]
            assert texts[:3] == [expected, " and", expected], payload
    assert guarded.complaints() == []


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=LONG)], ids=["some", "all"])
def test_no_name_of_a_run_runs_and_each_is_shown(every: int, guarded: Any, tmp_path: Path) -> None:
    for number, payload in enumerate(PAYLOADS[::every]):
        page = write_site(site_of(["x"], payload), tmp_path / str(number))
        guarded.load(page, "#overview")
        result = guarded.run(LATENT)
        assert result["ran"] == result["strangers"] == 0, payload
        assert guarded.run("document.querySelector('h1').textContent") == payload
        assert visible(guarded, payload) in result["all"]
        assert guarded.complaints() == []


@pytest.mark.parametrize("where", ["#d0/table?q={}", "#{}", "#d0/latent/{}", "#d0/{}", "#c0/{}"])
def test_no_address_runs(where: str, guarded: Any, tmp_path: Path) -> None:
    page = write_site(site_of(["x"], "a run"), tmp_path / "site")
    guarded.load(page, "#overview")
    for payload in PAYLOADS[::9]:
        text = payload.encode(errors="replace").decode()
        guarded.run(f"location.hash = {json.dumps(where.format(text))}")
        guarded.frames()
        result = guarded.run(LATENT)
        assert result["ran"] == result["strangers"] == 0, payload
    assert [c for c in guarded.complaints() if c["method"] != "Log.entryAdded"] == []
