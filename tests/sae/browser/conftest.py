"""A small page of plain data, its reader, and a Chromium that tests drive over a pipe."""

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.browser_example import example_site
from sae.browser import (
    Context,
    Curve,
    DictionaryPage,
    Histogram,
    LatentPage,
    PageData,
    ResultTable,
    SteeringExample,
    write_site,
)

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def _latent(latent: int, label: str) -> LatentPage:
    tokens = ("It", " is", " a", f" {label}", "\n")
    return LatentPage(
        latent=latent,
        label=label,
        kind="word",
        auc=0.875,
        auc_low=0.8125,
        auc_high=0.9375,
        status="scored",
        density=0.03125,
        max_activation=8.0,
        words=((label, 4.5), ("other", 1.25)),
        promoted=(f" {label}", "s"),
        suppressed=("ing",),
        contexts=(Context(tokens, (0.0, 0.001, 0.0, 8.0, 2.0), 3, f"book of {label}"),),
        histogram=(7, 3, 0, 1),
    )


def _dictionary(name: str, labels: tuple[str, ...]) -> DictionaryPage:
    return DictionaryPage(
        name=name,
        summary=f"the dictionary {name}",
        d_sae=23,
        n_rows=1009,
        n_live=19,
        n_dead=4,
        density_histogram=Histogram((-4.0, -3.0, -2.0, -1.0), (5, 11, 3), log10=True),
        latents=tuple(_latent(3 * i + 2, label) for i, label in enumerate(labels)),
    )


@pytest.fixture
def make_page() -> Callable[[str], PageData]:
    """A page in which one text stands at every place that a text can have."""

    def make(text: str) -> PageData:
        return PageData(
            title=text,
            subtitle=text,
            facts=((text, text),),
            results=ResultTable((text, "FVU"), ((text, "0.25"), ("other", text)), text),
            curves=(Curve(text, (7, 11, 13), {text: (0.5, 0.25, 0.125)}),),
            dictionaries=(_dictionary(text, (text, "river", "music")), _dictionary("relu", ("x",))),
            steering=(SteeringExample(text, 2, text, 8.0, text, text, text, text),),
            cautions=(text,),
        )

    return make


@pytest.fixture
def read_data() -> Callable[[Path], dict[str, Any]]:
    """The data of a written page, contexts unpacked to {tokens, activations, peak, source}."""

    def read(path: Path) -> dict[str, Any]:
        found = DATA.search(path.read_text(encoding="utf-8"))
        assert found is not None
        data = json.loads(found[1])
        for dictionary in data["dictionaries"]:
            columns = dictionary["latents"]
            for scale, contexts in zip(
                columns.get("scale", []), columns.get("contexts", []), strict=True
            ):
                contexts[:] = [_unpack(context, scale, data) for context in contexts]
        return data

    return read


def _unpack(context: list[Any], scale: float, data: dict[str, Any]) -> dict[str, Any]:
    levels = base64.b64decode(context[1])
    return {
        "tokens": tuple(data["strings"][i] for i in _leb128(base64.b64decode(context[0]))),
        "activations": tuple(level / 255 * scale for level in levels),
        "peak": context[2],
        "source": data["strings"][context[3]],
    }


def _leb128(raw: bytes) -> Iterator[int]:
    number, shift = 0, 0
    for byte in raw:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield number
            number, shift = 0, 0


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., Path]:
    """Writes the example of every part as a folder and gives its index.html."""

    def make(name: str = "site", n_latents: int = 251, payload: str | None = None) -> Path:
        return write_site(example_site(n_latents, payload), tmp_path / name)

    return make


class Chromium:
    """A headless Chromium, spoken to over a pipe in the DevTools protocol."""

    def __init__(self, profile: Path) -> None:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        assert program is not None, "this test needs chromium on the PATH"
        their_in, self._out = os.pipe()
        self._in, their_out = os.pipe()
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        command = f'exec "$0" "$@" 3<&{their_in} 4>&{their_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, program, *self._flags(profile)],
            pass_fds=(their_in, their_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    @staticmethod
    def _flags(profile: Path) -> tuple[str, ...]:
        quiet = ("first-run", "default-browser-check", "sandbox")
        off = ("gpu", "background-networking", "component-update", "sync", "extensions")
        return (
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            *(f"--no-{flag}" for flag in quiet),
            *(f"--disable-{flag}" for flag in off),
        )

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._in, 1 << 16)
            assert chunk, "Chromium closed its pipe"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, url: str) -> None:
        """Loads a page and waits until it has drawn itself."""
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not self.run('document.readyState === "complete" && !!document.querySelector("h1")'):
            pass
        self.frames()

    def frames(self) -> None:
        """Waits until what was asked for stands on the page."""
        wait = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.run(wait)

    def size(self, width: int, height: int) -> None:
        """Sets the size of the window."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def press(self, key: str) -> None:
        """One key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)
        self.frames()

    def settle(self, address: str) -> None:
        """Waits until the view of an address stands on the page."""
        shown = (
            f"router.route?.hash === {json.dumps(address)} && "
            "!document.querySelector('.map-frame > .notice')"
        )
        self.run(
            "new Promise((yes, no) => { const end = Date.now() + 9000; const look = () => "
            f"{shown} ? yes() : Date.now() > end ? no(Error('not shown')) : setTimeout(look, 5);"
            " look(); })"
        )
        self.frames()

    def load(self, page: Path, address: str) -> None:
        """Loads the browser's folder at an address."""
        self.open(page.as_uri() + address)
        self.settle(address)

    def write(self, text: str) -> None:
        """Text into the field that has the focus."""
        self.call("Input.insertText", text=text)
        self.frames()

    def complaints(self) -> list[dict[str, Any]]:
        """What the page has complained of since it was loaded."""
        bad = ("Log.entryAdded", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")
        return [event for event in self.events if event.get("method") in bad]

    def close(self) -> None:
        """Ends the browser."""
        os.close(self._out)
        os.close(self._in)
        self._process.terminate()
        self._process.wait(timeout=20)


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Chromium]:
    """A browser with an empty profile."""
    browser = Chromium(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """One browser for all tests of a file: what a test sets of it, it sets back."""
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """index.html of the example of every part, made once for all tests; only to read."""
    return write_site(example_site(), tmp_path_factory.mktemp("example") / "site")
