"""Keys that a run could see are in nothing that it says or writes."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.tiny import cache_record

NAMES = (
    "OPENAI_API_KEY", "OPENROUTER_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "SLURM_JWT", "MY_PASSWORD", "DATABASE_URL",
)  # fmt: skip
KEYS = {name: f"canary-{number}-{name.lower()}-5f3a9c" for number, name in enumerate(NAMES)}
IN_ADDRESS = ("http://canary-user:canary-word@h/v1", "http://h/v1?key=canary-query")


class Echo(BaseHTTPRequestHandler):
    """An endpoint that refuses, and repeats what it was sent: the key as well."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard.append(str(self.headers))
        body = json.dumps({"error": {"message": f"no access: {self.headers}"}}).encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Nothing."""


@pytest.fixture
def endpoint():
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        server.heard = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def config_of(path: Path, model: Path, text: Path, address: str) -> Path:
    entry = {"d_sae": 41, "activation": {"kind": "topk", "k": 5}, "dead_after_tokens": 500}
    record = {
        "output": str(path / "run"),
        "cache": cache_record(model, text, 2003),
        "train": {"batch": 127, "epochs": 2, "precision": "fp32", "saes": {"topk": entry}},
        "evaluate": {"n_contexts": 6, "n_contexts_special": 2},
        "explain": {
            "min_firings": 5,
            "min_examples": 2,
            "autointerp": {"llm": {"model": "m", "base_url": address, "api_key": "environment"}},
        },
    }
    (path / "run.yaml").write_text(json.dumps(record))
    return path / "run.yaml"


def sae(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "sae.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, env=os.environ | KEYS)


def shown(data: bytes) -> set[str]:
    """The keys in some bytes, as they are or compressed."""
    with contextlib.suppress(zlib.error):
        data += zlib.decompress(data, wbits=47)
    return {name for name, key in KEYS.items() if key.encode() in data}


def test_no_key_is_in_what_a_run_says_or_writes(
    tmp_path, tiny_model_dir, tiny_text, endpoint, figure
):
    address = f"http://127.0.0.1:{endpoint.server_port}/v1"
    config = config_of(tmp_path, tiny_model_dir, tiny_text, address)
    done = sae("run", config)
    assert done.returncode == 1, done.stderr
    assert KEYS["OPENAI_API_KEY"] in endpoint.heard[0]  # it was sent, to the one who may have it
    assert b"401" in done.stderr
    assert shown(done.stdout + done.stderr) == set()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"latents.parquet", "sae.safetensors", "run.yaml"} <= {path.name for path in files}
    assert {path.name: shown(path.read_bytes()) for path in files if shown(path.read_bytes())} == {}
    figure("S7", f"{len(KEYS)} keys: 0 in the output and in {len(files)} files of a whole run")


@pytest.mark.parametrize("address", IN_ADDRESS)
def test_an_address_with_a_key_in_it_is_refused_and_not_repeated(
    tmp_path, tiny_model_dir, tiny_text, address
):
    done = sae("run", config_of(tmp_path, tiny_model_dir, tiny_text, address))
    assert done.returncode == 2
    assert b"base_url must be" in done.stderr
    assert b"canary" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
