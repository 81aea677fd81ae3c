"""The prompt view's answers, and what serving a run's browser says."""

import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from activations_cache.config import ModelConfig
from activations_cache.models import load_model
from activations_cache.tokens import Pieces
from benchmarks.browser_example import example_site
from sae.architecture import SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder
from sae.browser import write_site
from sae.browser.server import BrowserServer
from sae.cli import latent_commands, main
from sae.run import browsing
from sae.run.browse_latents import MAX_TOKENS, PromptReader
from sae.run.browsing import read_explained
from sae.run.context import Run

HOOK = "model.layers.1:out"


@pytest.fixture
def run(tiny_model_dir: Path) -> Run:
    """As much of a run as reading a text needs."""
    loaded = load_model(ModelConfig(path=str(tiny_model_dir), dtype="float32"))
    d_in = loaded.model.config.hidden_size
    torch.manual_seed(0)
    dictionary = SparseAutoencoder(SAEConfig(d_in=d_in, d_sae=67, activation=TopK(k=5)))
    torch.nn.init.normal_(dictionary.enc_rows)
    known = Run.__new__(Run)  # what a config would lead to stands in its place
    known.__dict__.update(
        loaded=loaded,
        dictionaries={"topk": dictionary},
        hook_point=HOOK,
        config=SimpleNamespace(cache=SimpleNamespace(skip_positions=2)),
        pieces=Pieces(loaded.tokenizer),
    )
    return known


@torch.no_grad()
def test_a_text_gives_the_latents_of_each_token(run: Run) -> None:
    text = "She came home and read the letter."
    result = PromptReader(run)("topk", text)
    ids = run.loaded.tokenizer(text)["input_ids"]
    assert len(result.tokens) == len(result.fires) == len(ids) > 4
    assert "".join(result.tokens).endswith("letter.")
    states = run.loaded.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    dense = run.dictionaries["topk"].encode_dense(states[2][0])
    assert result.skipped == 2
    assert result.fires[:2] == ((), ())
    for position in range(2, len(ids)):
        values, latents = dense[position].sort(descending=True)
        n = int((values > 0).sum())
        assert [latent for latent, _ in result.fires[position]] == latents[:n].tolist()
        shown = [value for _, value in result.fires[position]]
        torch.testing.assert_close(torch.tensor(shown), values[:n])


def test_a_text_that_cannot_be_read_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match=f"text must have 1 to {MAX_TOKENS} tokens, got"):
        PromptReader(run)("topk", "a b " * MAX_TOKENS)
    assert len(PromptReader(run)("topk", "lone \ud800 surrogate").tokens) > 1


def said(latent: int, **more: object) -> str:
    score = {"scorer": "detection", "value": 0.75, "low": 0.5, "high": 1.0, "floor": 0.5, "n": 7,
             "reason": ""}  # fmt: skip
    record = {"latent": latent, "explanation": None, "scores": [score],
              "controls": {"another's label": [score]}}  # fmt: skip
    return json.dumps(record | more) + "\n"


def test_scores_of_rules_stand_beside_those_of_a_language_model(tmp_path: Path) -> None:
    text = {"text": "rivers", "client": "lm", "method": "m"}
    (tmp_path / "explanations.jsonl").write_text(said(3, explanation=text))
    (tmp_path / "rules.jsonl").write_text(said(3, explanation=text) + said(5, explanation=text))
    result = read_explained(tmp_path)
    assert [score["scorer"] for score in result[3]["scores"]] == ["detection", "rule: detection"]
    names = [score["scorer"] for score in result[3]["controls"]["another's label"]]
    assert names == ["detection", "rule: detection"]
    assert result[3]["explanation"] == text
    assert not result[5]["explanation"]  # the rule is the label itself
    assert read_explained(tmp_path / "nothing") == {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_site(example_site(7), tmp_path / "topk" / "browse").parent


def served(folder: Path, port: int = 0, host: str = "127.0.0.1", token: str | None = None) -> None:
    latent_commands._serve(folder, (host, port, token), None)


def test_what_is_there_is_served_until_ctrl_c(monkeypatch, capsys, folder: Path) -> None:
    def interrupted(server: BrowserServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BrowserServer, "serve_forever", interrupted)
    before = (folder / "data" / "index.js").stat().st_mtime_ns
    served(folder)
    out = capsys.readouterr().out
    assert "browser: http://127.0.0.1:" in out
    assert "ended" in out
    assert (folder / "data" / "index.js").stat().st_mtime_ns == before


def test_a_taken_port_and_an_open_host_are_refused(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"--port must be free on 127.0.0.1, got {port}"):
            served(folder, port)
    with pytest.raises(ValueError, match="pass --token too"):
        served(folder, host="0.0.0.0")


def test_the_command_hands_on_what_it_was_asked(monkeypatch, tmp_path: Path) -> None:
    written, served = [], []
    monkeypatch.setattr(browsing, "write_browser", lambda *given, **_: written.append(given[:-1]))
    monkeypatch.setattr(latent_commands, "_serve", lambda *given: served.append(given))
    (tmp_path / "sae.safetensors").write_bytes(b"")
    options = ["--serve", "--host", "::1", "--port", "0", "--token", "t", "--cache", "c"]
    monkeypatch.setattr(sys, "argv", ["sae", "browse", str(tmp_path), *options, "--out", "o"])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 0
    assert written == [(str(tmp_path), None, Path("o"), "c")]
    assert served == [(Path("o"), ("::1", 0, "t"), None)]
