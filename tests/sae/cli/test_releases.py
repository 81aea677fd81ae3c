"""`sae convert`, `sae push` and `sae verify-release` from the command line."""

import json
import sys

import numpy as np
import pytest
import torch

import sae as library
from sae.architecture import ReLU, SAEConfig, Slice, TopK
from sae.autoencoder import SparseAutoencoder
from sae.cli import console, main
from sae.pretrained.push import Pushed
from sae.run import releases

D, F = 7, 23


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(console.OUT, "width", 200)


@pytest.fixture
def sae(monkeypatch):
    def run(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["sae", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        return int(stop.value.code)

    return run


@pytest.fixture
def dictionary(tmp_path):
    point = (Slice(hook_point="model.layers.1:out", width=D),)
    made = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, activation=TopK(k=3), inputs=point))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    return library.save(made, tmp_path / "run" / "train" / "topk")


def test_conversion_there_and_back(sae, dictionary, tmp_path, capsys):
    assert sae("convert", dictionary, tmp_path / "b", "--to", "saelens") == 0
    assert "nothing: every number is as it was" in capsys.readouterr().out
    metadata = json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.1.hook_resid_post"  # as SAELens' models resolve it
    assert metadata["hook_point"] == "model.layers.1:out"
    assert sae("convert", tmp_path / "b", tmp_path / "c") == 0
    one, other = library.load(dictionary), library.load(tmp_path / "c")
    assert torch.equal(one.W_enc, other.W_enc)
    assert other.config.inputs == one.config.inputs
    source = json.loads((tmp_path / "c" / "provenance.json").read_text())["source"]
    assert source["source_format"] == "saelens"
    assert sae("inspect", tmp_path / "b") == 0
    assert "checked against sae-lens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "saebench"), "decoder rows must have one norm for a top-k"),
        (("--to", "other"), "--to must be one of"),
    ],
)
def test_conversions_that_are_refused(sae, dictionary, tmp_path, capsys, arguments, said):
    assert sae("convert", dictionary, tmp_path / "b", *arguments) == 1
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert not (tmp_path / "b").exists()
    assert sae("convert", dictionary, dictionary, "--to", "saelens") == 1
    assert "must be empty to be written to" in capsys.readouterr().err


def test_a_push_takes_what_the_dictionary_knows(sae, dictionary, monkeypatch, capsys):
    sent = []

    def push(path, repo, card, *, private):
        sent.append((path, repo, card, private))
        return Pushed(f"{repo}@abc", ("config.json",))

    monkeypatch.setattr(releases, "push_to_hub", push)
    about = ("--licence", "apache-2.0", "--model", "org/model")
    assert sae("push", dictionary, "org/name", *about) == 0
    path, repo, card, private = sent[0]
    assert (path, repo, private) == (dictionary, "org/name", True)
    assert card == ("apache-2.0", "org/model", "model.layers.1:out", {})
    assert "org/name@abc" in capsys.readouterr().out
    assert sae("push", dictionary, "org/name", *about, "--hook-point", "other:out") == 1
    assert "must be that of the dictionary, model.layers.1:out" in capsys.readouterr().err
    assert sae("push", dictionary, "org/name", "--model", "org/model") == 2
    assert len(sent) == 1


def test_a_push_needs_a_hook_point(sae, tmp_path, capsys):
    path = library.save(
        SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, activation=ReLU())), tmp_path / "x"
    )
    arguments = ("push", path, "org/name", "--licence", "mit", "--model", "org/model")
    assert sae(*arguments) == 1
    assert "--hook-point must be given" in capsys.readouterr().err


@pytest.fixture
def identity(tmp_path):
    """A dictionary that reconstructs every row: two latents per dimension, about half fire."""
    made = SparseAutoencoder(SAEConfig(d_in=D, d_sae=2 * D, activation=ReLU()))
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    made.enc_rows.data.copy_(both)
    made.dec_rows.data.copy_(both)
    return library.save(made, tmp_path / "identity")


@pytest.fixture
def cache(sae, tmp_path):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((97, D)))
    arguments = ("cache", "import", tmp_path / "rows.npy", tmp_path / "cache")
    assert sae(*arguments, "--hook-point", "clip:out") == 0
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("published", "code", "said"),
    [
        (("--published", f"l0={D},fvu=0.01"), 0, "meets the published figures: as loaded"),
        (("--published", f"l0={3 * D}"), 1, "meets the published figures: no reading"),
        ((), 1, "the published figures must be positive numbers"),
        (("--published", "l0=7", "--hook-points", "other:out"), 1, "must name one of ['clip:out']"),
    ],
)
def test_a_release_is_held_against_its_figures(sae, identity, cache, capsys, published, code, said):
    assert sae("verify-release", identity, cache, *published) == code
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_an_export_names_what_the_provenance_has(sae, dictionary, tmp_path):
    made = library.load(dictionary)
    model = {"path": "org/model", "model": "GPT2LMHeadModel", "dtype": "float32"}
    point = (Slice(hook_point="transformer.h.4.mlp:out", width=D),)
    placed = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, activation=TopK(k=3), inputs=point))
    placed.load_state_dict(made.state_dict())
    recorded = {"model": model, "rows": 4096, "context": 64}
    library.pretrained.monosema_format.save(placed, tmp_path / "a", recorded)
    assert sae("convert", tmp_path / "a", tmp_path / "b", "--to", "saelens") == 0
    metadata = json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]
    assert metadata == {
        "model_name": "org/model", "hook_name": "blocks.4.hook_mlp_out", "context_size": 64,
        "training_tokens": 4096, "hook_point": "transformer.h.4.mlp:out",
        "model_from_pretrained_kwargs": {"dtype": "float32"}, "sae_lens_version": "6.18.0",
    }  # fmt: skip


def test_a_place_without_a_word_is_a_module_s_path(sae, tmp_path):
    point = (Slice(hook_point="encoder.layer.3.output.dense:out", width=D),)
    made = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, activation=ReLU(), inputs=point))
    library.save(made, tmp_path / "a")
    assert sae("convert", tmp_path / "a", tmp_path / "b", "--to", "saelens") == 0
    metadata = json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "encoder.layer.3.output.dense"


def test_the_list_of_releases(sae, capsys):
    assert sae("releases", "gemma-2-2b", "layer_20", "16k", "res-canonical") == 0
    assert "gemma-scope-2b-pt-res-canonical:layer_20/width_16k/canonical" in capsys.readouterr().out
    assert sae("releases", "qwen-scope", "layer_3", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    entries = shown["data"]
    assert [row["name"] for row in shown["tables"][0]["rows"]] == [e["name"] for e in entries]
    assert {entry["hook_name"] for entry in entries} == {"blocks.3.hook_resid_post"}
    assert {"repo", "path", "format", "model", "l0", "name"} <= entries[0].keys()
    assert sae("releases") == 0
    out = capsys.readouterr().out
    assert "dictionaries" in out
    assert "sae-lens 6.54.12" in out
    assert sae("releases", "nothing-such") == 1
    assert "must fit a dictionary" in capsys.readouterr().err


def test_what_a_command_shows_is_one_json_object(sae, dictionary, cache, tmp_path, capsys):
    assert sae("inspect", dictionary, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert ["format", "monosema"] in shown["facts"][0]["rows"]
    assert sae("find", dictionary, "--near", "3", "n=2", "--json") == 0
    out = capsys.readouterr().out
    (table,) = json.loads(out)["tables"]
    assert len(table["rows"]) == 2
    assert table["rows"][0].keys() == {"latent", "cosine"}
    arguments = ("verify-release", dictionary, cache, "--published", "l0=1", "--json")
    assert sae(*arguments) == 1
    assert "hook point clip:out, got one of model.layers.1:out" in capsys.readouterr().err
    assert sae(*arguments, "--force") == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["lines"] == ["meets the published figures: no reading"]
    assert shown["tables"][0]["rows"]
    assert sae("inspect", tmp_path / "absent", "--json") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "must be at" in captured.err
    assert sae("inspect", dictionary) == 0
    assert "format" in capsys.readouterr().out
