"""`sae cache` and `sae verify`: build, look, import, list hook points, compare with the model."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sae.cli import console, main
from tests.tiny import cache_record


def sae(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sae", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return int(stop.value.code)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(console.OUT, "width", 200)


@pytest.fixture
def config(tmp_path, tiny_model_dir, tiny_text) -> Path:
    path = tmp_path / "tiny.yaml"
    record = {
        "output": str(tmp_path / "run"),
        "cache": cache_record(
            tiny_model_dir,
            tiny_text,
            1009,
            (
                "model.layers.1:out",
                "model.layers.1.mlp:out",
            ),
        ),
        "train": {"saes": {"topk": {"d_sae": 67, "activation": {"kind": "topk", "k": 5}}}},
    }
    path.write_text(json.dumps(record))
    return path


def test_a_cache_is_built_looked_at_and_compared(monkeypatch, capsys, config, tmp_path):
    cache = str(tmp_path / "run" / "cache")
    for words in (["build"], []):
        assert sae(monkeypatch, "cache", *words, str(config)) == 0
        out = capsys.readouterr().out
        assert "effective rank" in out
        assert "model.layers.1.mlp:out" in out
    assert sae(monkeypatch, "cache", "info", cache) == 0
    out = capsys.readouterr().out
    assert "massive dimensions" in out
    assert "1 shards" in out
    assert sae(monkeypatch, "verify", cache, "--model") == 0
    assert "2 hook points, whole, 64 of them computed again" in capsys.readouterr().out


def test_a_cache_of_another_model_is_named(monkeypatch, capsys, config, tmp_path, tiny_model_dir):
    assert sae(monkeypatch, "cache", str(config)) == 0
    capsys.readouterr()
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_model_dir.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.5}))
    cache = str(tmp_path / "run" / "cache")
    assert sae(monkeypatch, "verify", cache, "--model-path", str(other)) == 1
    err = capsys.readouterr().err
    assert "config_sha256 of the model must be the cache's" in err
    assert "model.layers.1:out must hold what the model gives" in err


@pytest.mark.parametrize("word", ["sites", "--list-sites"])
def test_the_former_name_costs_one_line(monkeypatch, capsys, word):
    assert sae(monkeypatch, "cache", word, "somewhere") == 2
    assert "`sae cache hook-points`" in " ".join(capsys.readouterr().err.split())


def test_the_hook_points_of_a_model_are_listed(monkeypatch, capsys, tiny_model_dir):
    assert sae(monkeypatch, "cache", "hook-points", str(tiny_model_dir)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model.layers.0:in" in lines
    assert "model.layers.4.self_attn:out" in lines


def test_an_array_is_imported(monkeypatch, capsys, tmp_path):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((97, 5)))
    arguments = ("cache", "import", str(tmp_path / "rows.npy"), str(tmp_path / "cache"))
    assert sae(monkeypatch, *arguments, "--hook-point", "clip:out", "--dtype", "int8") == 0
    out = capsys.readouterr().out
    assert "clip:out" in out
    assert "int8" in out
    assert sae(monkeypatch, "verify", str(tmp_path / "cache")) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["import", "nowhere.npy", "c"], 1, "array nowhere.npy must exist"),
        (["import", "nowhere.npy", "c", "--dtype", "int4"], 2, "'int4' is not one of 'bfloat16'"),
        (["info", "nowhere"], 1, "nowhere must be a directory with a cache"),
        (["hook-points", "nowhere/at/all"], 1, "must be a directory"),
        (["nowhere.yaml"], 2, "nowhere.yaml"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, code, said):
    assert sae(monkeypatch, "cache", *arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_cache_without_a_model_has_nothing_to_be_compared_with(monkeypatch, capsys, tmp_path):
    np.save(tmp_path / "rows.npy", np.ones((97, 5)))
    sae(monkeypatch, "cache", "import", str(tmp_path / "rows.npy"), str(tmp_path / "cache"))
    assert sae(monkeypatch, "verify", str(tmp_path / "cache"), "--model") == 1
    assert "must record its model to be compared" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["model.layers.1:out/acts/c/0/0", "manifest.json"])
def test_a_damaged_cache_is_mended_by_the_commands_that_are_named(
    monkeypatch, capsys, config, tmp_path, file
):
    cache = tmp_path / "run" / "cache"
    assert sae(monkeypatch, "cache", str(config)) == 0
    data = bytearray((cache / file).read_bytes())
    data[-9] ^= 4
    (cache / file).write_bytes(data)
    assert sae(monkeypatch, "verify", str(cache)) == 1
    capsys.readouterr()
    assert sae(monkeypatch, "verify", str(cache), "--mend") == 0
    said = capsys.readouterr()
    assert str(cache) in said.err
    assert "run the command that built it again" in said.out
    assert sae(monkeypatch, "cache", str(config)) == 0
    assert sae(monkeypatch, "verify", str(cache), "--mend") == 0
    assert "whole" in capsys.readouterr().out
