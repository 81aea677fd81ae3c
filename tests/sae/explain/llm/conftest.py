"""An endpoint that fails in every way on purpose."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.sae.explain.llm.services import Behaviour, Reply, State, completion, text_of

FAULTS = ("429", "429 wait", "500", "stall", "reset", "cut", "refusal", "nonsense")


class Endpoint:
    """A local OpenAI-compatible endpoint with a journal of what it answered."""

    def __init__(
        self,
        rate: float,
        mode: str | None,
        answer: Callable[[str, str], str],
        behaviour: Behaviour | None = None,
        stall: float = 1.5,
    ) -> None:
        self.rate, self.mode, self.answer = rate, mode, answer
        self.behaviour, self.state = behaviour, State()
        self.stall, self.at_kill = stall, []
        self.n_calls = 0
        self.answered: list[str] = []
        self.keys: set[str] = set()
        self.dice = random.Random(0)
        self.lock = threading.Lock()
        self.url = ""

    def fault(self) -> str | None:
        with self.lock:
            self.n_calls += 1
            if self.mode:
                return self.mode
            return self.dice.choice(FAULTS) if self.dice.random() < self.rate else None


class _Handler(BaseHTTPRequestHandler):
    endpoint: Endpoint

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.endpoint.keys.add(self.headers["authorization"] or "")
        with self.endpoint.lock:
            self.endpoint.state.n += 1
            self.endpoint.state.seen.append(body)
            behaviour = self.endpoint.behaviour
            reply = behaviour(body, self.endpoint.state) if behaviour else None
        if behaviour is not None:
            reply = reply or Reply(200, completion(text_of(body)))
            self._send(reply.status, reply.body, reply.headers)
            return
        fault = self.endpoint.fault()
        if fault in ("429", "429 wait"):
            wait = {"Retry-After": "0.01"} if fault == "429 wait" else {}
            self._send(429, {"error": {"message": "slow down"}}, wait)
        elif fault in ("401", "402", "403", "500"):
            key = self.headers["authorization"]
            self._send(int(fault), {"error": {"message": f"no: {key}"}})
        elif fault == "stall":
            time.sleep(self.endpoint.stall)
        elif fault == "reset":
            self.connection.close()
        else:
            self._answer(body, fault)

    def _answer(self, body: dict, fault: str | None) -> None:
        text = self.endpoint.answer(body["messages"][0]["content"], body["messages"][-1]["content"])
        message = {"role": "assistant", "content": text}
        if fault == "refusal":
            message = {"role": "assistant", "content": None, "refusal": "I would rather not"}
        if fault == "nonsense":
            message["content"] = "As I was saying,"
        usage = {"prompt_tokens": 90, "completion_tokens": 10}
        done = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
        if fault is None:
            with self.endpoint.lock:
                self.endpoint.answered.append(text)
        self._send(200, done, cut=fault == "cut")

    def _send(
        self,
        status: int,
        body: object,
        headers: Mapping[str, str] | None = None,
        cut: bool = False,
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        data = data[: len(data) // 2] if cut else data
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (OSError, ValueError):  # the client went away, or the fault closed the connection
            self.close_connection = True


def _answer(system: str, user: str) -> str:
    turns = [{"content": system}, {"content": user}]
    return text_of({"messages": turns})


@contextmanager
def _serve(
    rate: float = 0.0,
    mode: str | None = None,
    answer: Callable[[str, str], str] | None = None,
    behaviour: Behaviour | None = None,
    stall: float = 1.5,
) -> Iterator[Endpoint]:
    endpoint = Endpoint(rate, mode, answer or _answer, behaviour, stall)
    handler = type("Handler", (_Handler,), {"endpoint": endpoint})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def serve() -> Callable:
    return _serve
