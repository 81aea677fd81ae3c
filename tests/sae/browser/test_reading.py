"""Everybody can read it: widths, contrast, names, order of headings; and the prompt view."""

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

VIEWS = ("#overview", "#d0/table", "#d0/latent/12", "#d2/latent/12", "#d2/pictures", "#c0/pair/12")

# Text colour against what lies behind it, for every element that has text of its own.
CONTRAST = """(() => {
  const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const known = new Map();
  const read = (colour) => {
    if (!known.has(colour)) {
      paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
      known.set(colour, [...paint.getImageData(0, 0, 1, 1).data].map((v) => v / 255));
    }
    return known.get(colour);
  };
  const over = (top, low) => [0, 1, 2].map((i) => top[i] * top[3] + low[i] * (1 - top[3]));
  const light = (c) => c.slice(0, 3)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement)
      layers.push(read(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((low, top) => over(top, low), [1, 1, 1]);
  };
  const poor = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const box = node.getBoundingClientRect();
    if (!own || !box.width || node.closest('.unseen, [aria-hidden=true], noscript, option'))
      continue;
    const style = getComputedStyle(node);
    const ground = behind(node);
    const ink = over(read(node instanceof SVGElement ? style.fill : style.color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const name = node.className.baseVal ?? node.className;
    if (ratio < 4.5) poor.push([name, node.textContent.slice(0, 30), ratio]);
  }
  return poor;
})()"""
NAMELESS = """[...document.querySelectorAll(
  'a, button, input, select, textarea, [tabindex="0"]')].filter(
  (node) => !(node.labels?.length || node.ariaLabel || node.textContent.trim())
).map((node) => node.outerHTML.slice(0, 90))"""
TWICE = """[...document.querySelectorAll('[id]')].map((n) => n.id)
  .filter((id, i, all) => all.indexOf(id) < i)"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
LEVELS = """[...document.querySelectorAll('h1, h2, h3, h4')].map((n) => Number(n.tagName[1]))"""


def wears(reader: Any, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    reader.call("Emulation.setEmulatedMedia", features=features)


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("address", VIEWS)
def test_text_stands_out_and_nothing_overflows_at_any_width(
    address: str, scheme: str, reader: Any, example: Path
) -> None:
    wears(reader, scheme)
    reader.size(2560, 1300)
    reader.load(example, address)
    for width in (2560, 1024, 760, 360):
        reader.size(width, 800)
        reader.frames()
        assert reader.run(OVERFLOW) <= 0
    assert reader.run(CONTRAST) == []
    reader.size(1024, 800)
    reader.frames()
    assert reader.run(CONTRAST) == []


def test_words_without_end_widen_nothing(reader: Any, site: Any) -> None:
    page = site(n_latents=31, payload="averylongwordwithoutanyspace" * 9)
    for address in ("#overview", "#d0/table", "#d0/latent/12", "#c0", "#c0/pair/12"):
        reader.load(page, address)
        for width in (1024, 360):
            reader.size(width, 800)
            reader.frames()
            assert reader.run(OVERFLOW) <= 0


@pytest.mark.parametrize("width", [2560, 1280, 1024, 360])
def test_a_token_of_the_logit_lens_stays_on_one_line(
    width: int, reader: Any, example: Path
) -> None:
    reader.size(width, 800)
    reader.load(example, "#d0/latent/12")
    chips = "[...document.querySelectorAll('.lens .chip')]"
    assert reader.run(f"{chips}.length") >= 4
    assert reader.run(f"Math.max(...{chips}.map(c => c.getBoundingClientRect().height))") < 30


@pytest.mark.parametrize("address", VIEWS)
def test_controls_have_names_and_headings_an_order(
    address: str, reader: Any, example: Path
) -> None:
    reader.size(1024, 800)
    reader.load(example, address)
    assert reader.run(NAMELESS) == []
    assert reader.run(TWICE) == []
    levels = reader.run(LEVELS)
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))
    assert reader.run("[...document.images].every((image) => image.hasAttribute('alt'))") is True
    assert reader.run("document.documentElement.lang") == "en"


def test_the_contrast_check_sees_poor_text(reader: Any, example: Path) -> None:
    wears(reader, "light")
    reader.load(example, "#overview")
    reader.run("document.querySelector('h1').style.setProperty('color', 'rgb(190, 190, 190)')")
    assert len(reader.run(CONTRAST)) >= 1


def test_the_theme_is_chosen_and_remembered(reader: Any, example: Path) -> None:
    reader.load(example, "#overview")
    ground = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for _ in range(3):
        reader.run("document.querySelector('.theme').click()")
        seen[reader.run("currentTheme()")] = reader.run(ground)
    assert set(seen) == {"auto", "light", "dark"}
    assert seen["light"] != seen["dark"]
    reader.run("setTheme('dark')")
    reader.load(example, "#overview")
    assert reader.run(ground) == seen["dark"]
    reader.run("setTheme('auto')")


def test_the_tab_key_goes_from_the_skip_link_to_the_content(reader: Any, example: Path) -> None:
    reader.load(example, "#d0/latent/12")
    focus = "document.activeElement"
    stops = []
    for _ in range(10):
        reader.press("Tab")
        stops.append(reader.run(f"{focus}.textContent.trim() || {focus}.ariaLabel"))
    assert stops[0] == "Skip to the content"
    assert stops[1:4] == ["An example", "Overview", "Latents"]
    outline = f"getComputedStyle({focus}).outlineStyle"
    assert reader.run(outline) == "solid"
    reader.run("document.getElementById('skip').click()")
    assert reader.run(f"{focus}.tagName") == "H1"
    assert reader.run("location.hash") == "#d0/latent/12"


# ---- the prompt view, with a server that is made up

ANSWER = {
    "tokens": ["It", " is", " a", " river", "\n"],
    "fires": [[], [], [[7, 0.5]], [[12, 8.0], [7, 2.0]], [[3, 1.25]]],
    "skipped": 1,
}


@pytest.fixture
def served(reader: Any, example: Path, tmp_path: Path) -> Iterator[Any]:
    """A folder that takes itself for served; its server answers the same to everything."""
    page = shutil.copytree(example.parent, tmp_path / "site") / "index.html"
    server = json.dumps({"prompt": True, "dictionaries": ["d0"], "max_chars": 2000})
    (page.parent / "data/server.js").write_text(f"MONOSEMA.put(\"server\",'{server}')")
    fake = (
        "window.asked = []; window.answer = " + json.dumps(ANSWER) + ";"
        "window.fetch = async (address, {headers}) => { window.asked.push([address, headers]);"
        " return {json: async () => window.answer}; };"
    )
    script = reader.call("Page.addScriptToEvaluateOnNewDocument", source=fake)
    reader.load(page, "#prompt")
    yield reader
    reader.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])


def test_a_text_is_read_and_its_latents_are_listed(served: Any) -> None:
    assert served.run("[...document.querySelectorAll('#bar nav a')].at(-1).textContent") == "Prompt"
    served.run("document.querySelector('textarea').focus()")
    served.write("It is a river & more?\n")
    served.run("document.querySelector('.strong').click()")
    served.frames()
    address, headers = served.run("window.asked")[0]
    assert address == "api/prompt?dictionary=d0&text=It%20is%20a%20river%20%26%20more%3F%0A"
    assert headers == {"X-Monosema": "1"}
    assert served.run("document.querySelector('.reading').textContent") == "It is a river↵\u200b"
    links = "[...document.querySelectorAll('.prompt-list a')].map(a => a.hash)"
    assert served.run(links) == ["#d0/latent/12", "#d0/latent/7", "#d0/latent/3"]
    assert "the first token was not trained on" in served.run(
        "document.querySelector('.count').textContent"
    )
    served.run("document.querySelectorAll('.reading .token')[2].click()")
    assert served.run(links) == ["#d0/latent/7"]
    served.run("document.querySelector('.prompt-list button').click()")
    lit = "[...document.querySelectorAll('.reading .lit')].map(n => n.textContent)"
    assert served.run(lit) == [" a", " river"]
    assert served.complaints() == []


def test_what_the_server_refuses_is_said(served: Any) -> None:
    served.run("window.answer = {error: 'text must be at most 2000 characters, got 2001'}")
    served.run("document.querySelector('textarea').value = 'x'")
    served.run("document.querySelector('.strong').click()")
    served.frames()
    said = served.run("document.querySelector('.count').textContent")
    assert said == "text must be at most 2000 characters, got 2001"
    assert served.run("document.querySelector('.strong').disabled") is False
