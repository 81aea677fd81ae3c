"""A dictionary goes to a hub on this machine by the hub's own client, and comes back from it."""

import base64
import functools
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import HfApi, constants, snapshot_download

import sae
from sae.architecture import SAEConfig, Slice, TopK
from sae.autoencoder import SparseAutoencoder
from sae.pretrained import DictionaryFormatError, hub, load_with_source
from sae.pretrained.push import Card, card_text, push

D, F = 7, 23
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = Card("apache-2.0", "org/model", "model.layers.5:out", {"fvu": 0.1234567, "l0": 3.0})


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one commit and one download need."""

    files: dict[str, bytes]
    asked: list[str]

    def answer(self, record=None, data=b"", **headers):
        data = data if record is None else json.dumps(record).encode()
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(f"{self.path} {self.headers.get('Authorization')}")
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return self.answer({"files": modes})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            return self.answer({
                "commitUrl": f"https://huggingface.co/org/name/commit/{COMMIT}",
                "commitOid": COMMIT,
            })
        return self.answer({"url": "https://huggingface.co/org/name", "name": "org/name"})

    def do_GET(self):
        if "/tree/" in self.path:
            sizes = {name: len(data) for name, data in self.files.items()}
            entry = {"type": "file", "oid": COMMIT}
            return self.answer([entry | {"path": n, "size": s} for n, s in sizes.items()])
        if self.path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.files]
            return self.answer({"id": "org/name", "sha": COMMIT, "siblings": siblings})
        data = self.files[self.path.partition(f"/resolve/{COMMIT}/")[2]]
        tag = hashlib.sha256(data).hexdigest()
        return self.answer(data=data, **{"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def local_hub():
    handler = type("Handler", (Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def dictionary(tmp_path):
    point = (Slice(hook_point="model.layers.5:out", width=D),)
    made = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, activation=TopK(k=3), inputs=point))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    return made, sae.save(made, tmp_path / "topk", {"cache": "abc", "recipe": {"k": 3}})


def test_there_and_back(local_hub, dictionary, tmp_path, monkeypatch):
    endpoint, handler = local_hub
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the hub is on this machine
    made, path = dictionary
    done = push(path, "org/name/layer-5", CARD, api=HfApi(endpoint, token="hf_secret"))
    assert done.name == f"org/name/layer-5@{COMMIT}"
    assert set(handler.files) == set(done.files)
    assert {name.rpartition("/")[0] for name in done.files} == {"layer-5"}
    assert any("/api/repos/create Bearer hf_secret" in line for line in handler.asked)
    assert not any(b"hf_secret" in data for data in handler.files.values())
    fetch = functools.partial(snapshot_download, endpoint=endpoint, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    back = load_with_source(done.name)
    assert back.source.source_path == done.name
    assert back.dictionary.config == made.config
    assert torch.equal(back.dictionary.W_dec, made.W_dec)


def test_the_card_says_what_it_is(dictionary):
    text = card_text(load_with_source(dictionary[1]), CARD, {"cache": "abc"}, "org/name")
    assert text.startswith(
        "---\nlibrary_name: monosema\nlicense: apache-2.0\nbase_model: org/model"
    )
    for part in (
        'sae.load("org/name")', "| hook point | `model.layers.5:out` |", "| fvu | `0.123457` |",
        "| cache | `abc` |", "| latents | `23` |", "| sha256 of sae.safetensors | `",
    ):  # fmt: skip
        assert part in text


def test_a_card_cannot_be_broken_out_of(dictionary):
    bad = {"x`|y\n---\nlicense: mit": "a`b|c\nd\x1b[31m"}
    card = CARD._replace(metrics=bad, hook_point="a`b\n# title")
    text = card_text(load_with_source(dictionary[1]), card, bad, "org/name")
    assert text.count("\n---\n") == 1
    assert "\x1b" not in text
    assert "\n# title" not in text
    assert "a'b\\|c d" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licence": "All rights: mine\nx"}, "the licence must be named as the hub does"),
        ({"model": "a\nb"}, "the model must be a name of the hub"),
        ({"hook_point": " "}, "the hook point must be named"),
    ],
)
def test_cards_that_are_refused(dictionary, change, message):
    with pytest.raises(DictionaryFormatError, match=message):
        push(dictionary[1], "org/name", CARD._replace(**change))


def test_what_is_not_sent(local_hub, dictionary, tmp_path, make, peer):
    endpoint, handler = local_hub
    api = HfApi(endpoint, token="hf_secret")
    peer.write(tmp_path / "cfg.json", {"d_in": D, "k": 3, "num_latents": F})
    with pytest.raises(DictionaryFormatError, match=r"must hold config\.json"):
        push(tmp_path, "org/name", CARD, api=api)
    with pytest.raises(DictionaryFormatError, match="must be named without @"):
        push(dictionary[1], "org/name@main", CARD, api=api)
    with pytest.raises(FileNotFoundError):
        push(dictionary[1], "../name", CARD, api=api)
    assert not handler.asked
    refusing = HfApi("http://127.0.0.1:9", token="hf_secret")
    with pytest.raises(DictionaryFormatError, match="that you may write") as caught:
        push(dictionary[1], "org/name", CARD, api=refusing)
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)
