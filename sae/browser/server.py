"""Show the browser's folder on a local address, and read texts with the model for it.

The server answers GET and HEAD and has nothing to write with. It listens on this machine alone
unless it is told otherwise, and then asks for a token. A request must name the server's own address
as its host, so that a site whose name is pointed at this machine cannot read it; what costs work
must carry a header that a browser sends to its own site only. No request is logged: its address may
hold a text.
"""

import hmac
import ipaddress
import json
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from urllib.parse import parse_qs, quote, unquote

from activations_cache import seals
from activations_cache.checks import DamagedFileError, MonosemaError, require
from sae.browser.detail import script
from sae.browser.write import INDEX, POLICY

LOCAL = ("127.0.0.1", "localhost", "::1")
MAX_CHARS = 2000
"""Longest text that is read."""

HEADER = "X-Monosema"
COOKIE = "monosema"
MIN_TOKEN = 16
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".jpg": "image/jpeg",
    ".svg": "image/svg+xml",
}
_SECONDS = 30


@dataclass(frozen=True)
class TextReading:
    """A text as a dictionary sees it."""

    tokens: tuple[str, ...]
    """The text's tokens."""
    fires: tuple[tuple[tuple[int, float], ...], ...]
    """For each token the latents that fire with their activations, strongest first."""
    skipped: int
    """First tokens on which the dictionary was not trained; nothing is said of them."""


Reader = Callable[[str, str], TextReading]
"""From the name of a dictionary and a text; ValueError says what is wrong with the text."""


@dataclass(frozen=True)
class PromptView:
    """The view in which a text is read."""

    read: Reader
    """Loads what it needs when it is first called."""
    names: Mapping[str, str]
    """Names of the dictionaries that can read, by their ids in the folder."""


class BrowserServer(ThreadingHTTPServer):
    """Serves one folder.

    Args:
        folder: What `write_site` wrote.
        host: Where to listen.
        port: The same; 0 takes a free one.
        token: What a request must know; needed for every host but this machine.
        prompts: The view in which a text is read; none when absent.
        in_frames: Whether other pages may show it in a frame, as a notebook does.

    Raises:
        ValueError: If there is no browser in the folder, or a token is missing or too short.
    """

    daemon_threads = True

    def __init__(
        self,
        folder: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token: str | None = None,
        prompts: PromptView | None = None,
        in_frames: bool = False,
    ) -> None:
        """Listen; `serve_forever` answers."""
        if not (folder / INDEX).is_file():
            raise MonosemaError(f"folder must hold {INDEX}, got {folder} without")
        require(0 <= port <= 65535, "port", "be from 0 to 65,535", port)
        if host not in LOCAL and token is None:
            raise MonosemaError(
                f"host must be one of {', '.join(LOCAL)} without a token, got {host!r}; others on "
                "the network could read the run: pass --token too"
            )
        if token is not None and (len(token) < MIN_TOKEN or not token.isascii()):
            raise MonosemaError(
                f"token must have at least {MIN_TOKEN} ASCII characters, got {len(token)}"
            )
        self.folder, self.token, self.prompts = folder.resolve(), token, prompts
        self.host = host
        self.policy = POLICY if in_frames else f"{POLICY}; frame-ancestors 'none'"
        self.reading = Lock()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a reader who went away; other errors are shown as always."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # pyright: ignore[reportArgumentType]

    @property
    def url(self) -> str:
        """Where the browser is seen; with the token, if there is one."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        asked = "" if self.token is None else f"?token={quote(self.token, safe='')}"
        return f"http://{name}:{self.server_address[1]}/{asked}"

    def is_ours(self, host: str) -> bool:
        """Whether a request's Host is an address of this server, not a name that was bent to it."""
        name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "80")
        if not name:
            name, port = host, "80"
        if port != str(self.server_address[1]):
            return False
        bare = name.strip("[]").lower()
        if bare in LOCAL or bare == self.host.lower():
            return True
        if self.host in LOCAL:
            return False
        return bare in {socket.gethostname().lower(), socket.getfqdn().lower()} or _is_number(bare)


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _Refused(Exception):
    """An answer other than the one that was asked for."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: BrowserServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "monosema", ""
    timeout = _SECONDS

    def do_GET(self) -> None:
        """Answer."""
        try:
            self._check()
            self._answer()
        except _Refused as refused:
            body = json.dumps({"error": str(refused)}).encode()
            self._send(refused.status, body, "application/json")

    do_HEAD = do_GET

    def _check(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not self.server.is_ours(hosts[0]):
            raise _Refused(HTTPStatus.FORBIDDEN, "host must be this server's address")
        if self.server.token is not None and not self._knows(self.server.token):
            raise _Refused(HTTPStatus.UNAUTHORIZED, "open the address that `sae browse` printed")

    def _knows(self, token: str) -> bool:
        given = parse_qs(self.path.partition("?")[2]).get("token", [])
        for part in self.headers.get("Cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == COOKIE:
                given.append(unquote(value))
        # Bytes: compare_digest takes no other text than ASCII.
        known = token.encode()
        return any(hmac.compare_digest(text.encode(errors="replace"), known) for text in given)

    def _answer(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/api/prompt":
            self._prompt(parse_qs(query, keep_blank_values=True))
        elif path == "/" and self.server.token is not None and query.startswith("token="):
            self._remember(self.server.token)
        elif path == "/data/server.js":
            self._send(HTTPStatus.OK, self._abilities().encode(), _TYPES[".js"])
        else:
            file = self._file(path)
            try:
                data = seals.read(
                    file, self.server.folder.resolve(), advice="run `sae browse` again"
                )
            except DamagedFileError as error:
                raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from error
            self._send(HTTPStatus.OK, data, _TYPES[file.suffix])

    def _remember(self, token: str) -> None:
        """Move the token from the address, where it would be seen and kept, into a cookie."""
        cookie = f"{COOKIE}={quote(token, safe='')}; HttpOnly; SameSite=Strict; Path=/"
        self._send(HTTPStatus.SEE_OTHER, b"", _TYPES[".html"], Location="/", Set_Cookie=cookie)

    def _abilities(self) -> str:
        prompts = self.server.prompts
        ids = list(prompts.names) if prompts else []
        results = {"prompt": bool(ids), "dictionaries": ids, "max_chars": MAX_CHARS}
        return script("server", results)

    def _file(self, path: str) -> Path:
        """The file of an address; whatever is no file of the folder does not exist."""
        missing = _Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        name = unquote(path).removeprefix("/") or INDEX
        parts = name.split("/")
        if "\0" in name or "\\" in name or any(part[:1] in ("", ".") for part in parts):
            raise missing
        try:
            file = (self.server.folder / name).resolve()
            inside = file.is_relative_to(self.server.folder) and file.suffix in _TYPES
            if inside and file.is_file():  # which raises for a name that is too long
                return file
        except (OSError, ValueError):
            raise missing from None
        raise missing

    def _prompt(self, query: dict[str, list[str]]) -> None:
        prompts = self.server.prompts
        if prompts is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "this server reads no texts")
        if self.headers.get(HEADER) is None:
            raise _Refused(HTTPStatus.FORBIDDEN, f"a text must come with the header {HEADER}")
        name = prompts.names.get("".join(query.get("dictionary", [])))
        text = "".join(query.get("text", []))
        if name is None:
            raise _Refused(HTTPStatus.BAD_REQUEST, "dictionary must be one that can read texts")
        if not 0 < len(text) <= MAX_CHARS:
            rule = f"text must have 1 to {MAX_CHARS} characters, got {len(text)}"
            raise _Refused(HTTPStatus.BAD_REQUEST, rule)
        if not self.server.reading.acquire(timeout=_SECONDS):
            raise _Refused(HTTPStatus.TOO_MANY_REQUESTS, "another text is being read; try again")
        try:
            result = prompts.read(name, text)
        except (ValueError, OSError) as error:
            line = " ".join(str(error).split())
            raise _Refused(HTTPStatus.BAD_REQUEST, line) from error
        finally:
            self.server.reading.release()
        body = json.dumps(asdict(result)).encode()
        self._send(HTTPStatus.OK, body, "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: an address may hold a text or a token."""
