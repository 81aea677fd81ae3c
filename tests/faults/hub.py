"""A hub on this machine that has one dataset, and fails now and then.

`python -m tests.faults.hub SHARE SEED` prints its port. That share of all requests fails, by turns:
the connection is reset, nothing comes, an error of the server, a file that is there is not found,
the body is cut.
"""

import hashlib
import itertools
import json
import random
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

N_FILES, PER_FILE = 40, 11
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FAULTS = ("reset", "stall", "502", "404", "cut")
STALL_S = 3.0


def text(number: int) -> str:
    return f"Document {number}: " + " ".join(str(number * i % 97) for i in range(60))


def files() -> dict[str, bytes]:
    made = {}
    for number in range(N_FILES):
        some = range(number * PER_FILE, (number + 1) * PER_FILE)
        lines = (json.dumps({"text": text(n)}) for n in some)
        made[f"data/train-{number:05d}.jsonl"] = "\n".join(lines).encode() + b"\n"
    return made


class Hub(ThreadingHTTPServer):
    """Serves the dataset org/name."""

    daemon_threads = True

    def __init__(self, share: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.share, self.random = files(), share, random.Random(seed)
        self.turn, self.lock = itertools.cycle(FAULTS), threading.Lock()
        self.n_requests, self.faults = 0, dict.fromkeys(FAULTS, 0)

    def fault(self, is_file: bool) -> str:
        """What is wrong with the next answer; only a file that is there can be not found."""
        with self.lock:
            self.n_requests += 1
            if self.random.random() >= self.share:
                return ""
            kind = next(self.turn)
            kind = next(self.turn) if kind == "404" and not is_file else kind
            self.faults[kind] += 1
            return kind


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = re.sub(r"^/datasets/org/name/resolve/\w+/", "", path)
        if path == "/faults":
            self.send(200, json.dumps([self.server.n_requests, self.server.faults]).encode())
            return
        kind = self.server.fault(is_file=name in self.server.files)
        if kind in ("reset", "stall"):
            time.sleep(STALL_S if kind == "stall" else 0)
            self.close_connection = True
        elif kind in ("502", "404"):
            self.send(int(kind), b"{}")
        elif name in self.server.files:
            self.file(self.server.files[name], is_cut=kind == "cut")
        else:
            self.about(path, query, asked, is_cut=kind == "cut")

    do_HEAD = do_POST = do_GET

    def file(self, data: bytes, *, is_cut: bool) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            self.send(200, data, is_cut=is_cut, **headers)
            return
        start, stop = int(part[1]), min(int(part[2] or len(data)), len(data) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.send(206, data[start:stop], is_cut=is_cut, **headers)

    def about(self, path: str, query: str, asked: bytes, *, is_cut: bool) -> None:
        result = self.server.files.items()
        tree = [
            {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
            for name, data in result
        ]
        folder = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "data"}]
        if re.fullmatch(r"/api/datasets/org/name(/revision/\w+)?", path):
            siblings = [{"rfilename": name} for name, _ in result]
            answer = {"_id": "1", "id": "org/name", "sha": COMMIT, "siblings": siblings, "tags": []}
            answer |= {"private": False, "gated": False, "disabled": False}
        elif "/paths-info/" in path:
            names = parse_qs(asked.decode()).get("paths") or json.loads(asked)["paths"]
            answer = [entry for entry in tree + folder if entry["path"] in names]
        elif re.search(r"/tree/\w+/data$", path) or "recursive=true" in query.lower():
            answer = tree
        elif re.search(r"/tree/\w+$", path):
            answer = folder
        else:
            self.send(404, b"{}", **{"X-Error-Code": "EntryNotFound"})
            return
        self.send(200, json.dumps(answer).encode(), is_cut=is_cut)

    def send(self, status: int, body: bytes, *, is_cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Type": "application/json"}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
        self.close_connection = self.close_connection or is_cut

    def log_message(self, *_: object) -> None:
        """Nothing."""


if __name__ == "__main__":
    hub = Hub(float(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.write(f"{hub.server_port}\n")
    sys.stdout.flush()
    hub.serve_forever()
