"""The views from the local server: the same pages, and the one that needs the server."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from sae.browser.server import BrowserServer, PromptView, TextReading
from tests.sae.browser.views import VIEWS

ALL = VIEWS | {"#prompt": "Which latents fire where"}


def read(name: str, text: str) -> TextReading:
    """A reader for whom latent 12 fires on every second word, and which knows one bad text."""
    if "\x00" in text:
        raise ValueError("text must hold no NUL, got one")
    words = tuple(f" {word}" for word in text.split())
    fires = tuple(((12, 1.0 + i),) if i % 2 else () for i in range(len(words)))
    return TextReading(words, fires, skipped=1)


@pytest.fixture(scope="module")
def url(example: Path) -> Iterator[str]:
    prompts = PromptView(read, {"d0": "topk"})
    with BrowserServer(example.parent, prompts=prompts) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.url
        server.shutdown()


@pytest.mark.parametrize(("address", "title"), ALL.items())
def test_every_view_loads_from_the_server_alone(
    address: str, title: str, reader: Any, url: str
) -> None:
    reader.open(url + address)
    reader.settle(address)
    assert reader.run("document.querySelector('h1').textContent") == title
    assert reader.complaints() == []
    sent = [e["params"] for e in reader.events if e.get("method") == "Network.requestWillBeSent"]
    assert {s["request"]["url"].startswith(url) for s in sent} == {True}


def test_a_prompt_is_read_by_the_server(reader: Any, url: str) -> None:
    reader.open(f"{url}#prompt")
    reader.settle("#prompt")
    reader.run("document.querySelector('textarea').value = 'she <b>told</b> him'")
    reader.run("document.querySelector('.strong').click()")
    reader.run(
        "new Promise(done => { const look = () => document.querySelector('.prompt-list') "
        "? done() : setTimeout(look, 5); look(); })"
    )
    assert reader.run("document.querySelector('.reading').textContent") == " she <b>told</b> him"
    lit = "[...document.querySelectorAll('.reading .lit')].map(n => n.dataset.value)"
    assert reader.run(lit) == ["2.00"]
    reader.run("document.querySelector('.prompt-list a').click()")
    reader.settle("#d0/latent/12")
    assert reader.complaints() == []


def test_what_the_server_says_of_a_bad_text_is_shown(reader: Any, url: str) -> None:
    reader.open(f"{url}#prompt")
    reader.settle("#prompt")
    reader.run("document.querySelector('textarea').value = 'a\\0b'")
    reader.run("document.querySelector('.strong').click()")
    said = "document.querySelector('.count').textContent"
    reader.run(
        f"new Promise(done => {{ const look = () => {said}.includes('NUL') "
        "? done() : setTimeout(look, 5); look(); })"
    )
    assert reader.run("document.querySelector('.strong').disabled") is False
