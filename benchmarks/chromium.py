"""A headless Chromium that is driven over a pipe, for what is tested and measured in a browser."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any


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
