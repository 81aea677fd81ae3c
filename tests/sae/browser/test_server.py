"""The local server: who may read, what exists, and that texts are read for its own page alone."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from benchmarks.browser_example import example_site
from sae.browser import write_site
from sae.browser.server import MAX_CHARS, BrowserServer, PromptView, TextReading

TOKEN = "0123456789abcdef-%é".replace("é", "e")
UPS = ("..", "%2e%2e", "%2E%2E", ".%2e", "..%2f..", "..%5c..", "%252e%252e", "..\\..", "....//..")
TARGETS = ("etc/passwd", "secret.js", "site/../secret.js", "../secret.js", "%00secret.js")
HEADS = ("", "/", "//", "assets/", "data/", "data/images/", "/data/d0/latents/")
MORE = (
    "/data", "/data/", "/assets", "/data/d0", "/done.json", "/run.yaml", "/index.html/", "/link.js",
    "/index.html%00.js", "/data/index.js%00", "/data/index", "/data/index.js/..", "/.hidden.js",
    "/data/.hidden.js", "/CON", "/~root/.bashrc", "/%", "/%ff", "/data/index.js%20", "/index.htm",
    "file:///etc/passwd", "/data/d0/latents/99999.js", "/api", "/api/", "/api/prompt/x",
    f"/{300 * 'x'}.js",
)  # fmt: skip
TRAVERSALS = [f"/{head}{up}/{target}" for head, up, target in product(HEADS, UPS, TARGETS)]


def read(name: str, text: str) -> TextReading:
    """Tells what it was asked; a text "bad" is one that cannot be read."""
    if text == "bad":
        raise ValueError("text must be good,\ngot 'bad'")
    return TextReading((name, text), ((), ((3, 0.5),)), 1)


@contextmanager
def serving(index: Path, **options: Any) -> Iterator[BrowserServer]:
    with BrowserServer(index.parent, **options) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(timeout=10)
        assert not thread.is_alive()


def ask(
    server: BrowserServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body; `Host` is the server's own unless another one is given."""
    host, port = server.server_address[:2]
    connection = http.client.HTTPConnection(str(host), int(port), timeout=10)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    headers = {"Host": f"127.0.0.1:{port}"} | {k.replace("_", "-"): v for k, v in headers.items()}
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    results = (answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    connection.close()
    return results


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_site(example_site(61), tmp_path_factory.mktemp("server") / "site")
    (path.parent.parent / "secret.js").write_text("secret")
    (path.parent / ".hidden.js").write_text("secret")
    (path.parent / "done.json").write_text("{}")
    (path.parent / "link.js").symlink_to(path.parent.parent / "secret.js")
    return path


def test_the_folder_is_served_with_its_policy(index: Path) -> None:
    with serving(index) as server:
        assert server.server_address[0] == "127.0.0.1"
        for path, kind in {
            "/": "text/html",
            "/index.html": "text/html",
            "/assets/store.js": "text/javascript",
            "/data/d0/latents/0.js": "text/javascript",
            "/data/images/3.jpg": "image/jpeg",
        }.items():
            status, headers, body = ask(server, path)
            assert status == 200
            assert headers["content-type"].startswith(kind)
            assert body == (index.parent / (path.lstrip("/") or "index.html")).read_bytes()
            assert "script-src 'self'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert "access-control-allow-origin" not in headers
        assert ask(server, "/", "HEAD")[::2] == (200, b"")


def test_no_address_leads_out_of_the_folder(index: Path) -> None:
    assert len(set(TRAVERSALS)) >= 300
    with serving(index) as server:
        for path in (*TRAVERSALS, *MORE):
            status, _, body = ask(server, path)
            assert status == 404, path
            assert b"secret" not in body
            assert b"root:" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_nothing_but_reading_is_done(method: str, index: Path) -> None:
    with serving(index) as server:
        assert ask(server, "/data/index.js", method)[0] == 501


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil:{port}",
     "localhost.evil.example:{port}", "", ":{port}", "10.0.0.1:{port}", "[::ffff:10.0.0.1]:{port}"],
)  # fmt: skip
def test_another_name_is_refused(host: str, index: Path) -> None:
    with serving(index) as server:
        named = host.format(port=server.server_address[1])
        assert ask(server, "/", Host=named)[0] == 403


def test_its_own_names_are_answered(index: Path) -> None:
    with serving(index) as server:
        port = server.server_address[1]
        for host in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]"):
            assert ask(server, "/", Host=f"{host}:{port}")[0] == 200


def test_without_or_with_two_hosts_nothing_is_answered(index: Path) -> None:
    with serving(index) as server:
        port = server.server_address[1]
        for hosts in ("", f"Host: 127.0.0.1:{port}\r\nHost: evil.example\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
                raw.sendall(f"GET / HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n".encode())
                assert raw.recv(64).startswith(b"HTTP/1.1 403")


def test_a_token_is_asked_for_everywhere_and_moves_into_a_cookie(index: Path) -> None:
    with serving(index, token=TOKEN) as server:
        for path in ("/", "/data/index.js", "/api/prompt", "/?token=wrong", "/?token=", "/x"):
            assert ask(server, path)[0] == 401
            assert ask(server, path, Cookie=f"monosema={TOKEN[:-1]}")[0] == 401
        status, headers, _ = ask(server, "/" + server.url.partition(f":{server.server_port}/")[2])
        assert (status, headers["location"]) == (303, "/")
        cookie, *rest = headers["set-cookie"].split("; ")
        assert rest == ["HttpOnly", "SameSite=Strict", "Path=/"]
        assert ask(server, "/data/index.js", Cookie=f"other=1; {cookie}")[0] == 200


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": "0.0.0.0"}, "host must be one of 127.0.0.1, localhost, ::1 without a token"),
        ({"host": ""}, "without a token"),
        ({"host": "0.0.0.0", "token": "short"}, "token must have at least 16 ASCII characters"),
        ({"token": "é" * 20}, "ASCII"),
    ],
)
def test_an_open_server_is_refused(options: dict[str, Any], said: str, index: Path) -> None:
    with pytest.raises(ValueError, match=said):
        BrowserServer(index.parent, **options)


def test_on_all_addresses_other_names_are_refused_still(index: Path) -> None:
    with serving(index, host="0.0.0.0", token=TOKEN) as server:
        port, cookie = server.server_address[1], f"monosema={TOKEN.replace('%', '%25')}"
        for host, status in (("10.1.2.3", 200), (socket.gethostname(), 200), ("evil.example", 403)):
            assert ask(server, "/", Host=f"{host}:{port}", Cookie=cookie)[0] == status


def test_a_folder_without_a_browser_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder must hold index\.html"):
        BrowserServer(tmp_path)


def test_a_text_is_read_for_its_own_page_alone(index: Path) -> None:
    prompts = PromptView(read, {"d0": "topk"})
    with serving(index, prompts=prompts) as server:
        asked = "/api/prompt?dictionary=d0&text=It%20is%20%3Cb%3E%E2%80%A8"
        assert ask(server, asked)[0] == 403
        status, headers, body = ask(server, asked, X_Monosema="1")
        assert (status, headers["content-type"]) == (200, "application/json")
        assert json.loads(body) == {
            "tokens": ["topk", "It is <b>\u2028"],
            "fires": [[], [[3, 0.5]]],
            "skipped": 1,
        }
        assert b'"prompt":true,"dictionaries":["d0"]' in ask(server, "/data/server.js")[2]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("dictionary=d0&text=bad", "text must be good, got 'bad'"),
        ("dictionary=d0", f"text must have 1 to {MAX_CHARS} characters, got 0"),
        (f"dictionary=d0&text={'a' * 2003}", "got 2003"),
        ("dictionary=d1&text=a", "dictionary must be one that can read texts"),
        ("text=a", "dictionary must be"),
    ],
)
def test_a_bad_text_is_answered_in_one_line(query: str, said: str, index: Path) -> None:
    with serving(index, prompts=PromptView(read, {"d0": "topk"})) as server:
        status, _, body = ask(server, f"/api/prompt?{query}", X_Monosema="1")
        assert status == 400
        assert said in json.loads(body)["error"]
        assert "\n" not in json.loads(body)["error"]


def test_without_a_reader_there_is_no_prompt_view(index: Path) -> None:
    with serving(index) as server:
        assert ask(server, "/api/prompt?dictionary=d0&text=a", X_Monosema="1")[0] == 404
        assert b'"prompt":false' in ask(server, "/data/server.js")[2]


def test_nothing_that_was_asked_is_printed(index: Path, capfd: pytest.CaptureFixture) -> None:
    with serving(index, token=TOKEN) as server:
        ask(server, "/api/prompt?text=confidential")
        ask(server, f"/?token={TOKEN}")
    assert capfd.readouterr() == ("", "")
