"""What commit d8b6d6c wrote is read, resumed and accepted as done; README.md says what it is."""

import hashlib
import json
import shutil
import struct
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import activations_cache
import sae
from sae.cli import main
from sae.metrics import Firing
from tests.exact import numerics

FIXTURES = Path(__file__).parent / "d8b6d6c"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
STEPS = ("cache", "train", "evaluate", "explain", "steer", "browse")
HOOK_POINTS = ["model.layers.1:out", "model.layers.0:out"]
N_ROWS = 17
NEAR = {"rtol": 1e-3, "atol": 1e-4}
"""Between kinds of CPU, after a training of some 30 steps."""


@pytest.fixture(autouse=True)
def written(tmp_path: Path) -> Path:
    """The fixtures where the tests run: paths in the configurations are relative."""
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    for name in ("cache", "run", "stopped"):
        with tarfile.open(f"{name}.tar.xz") as archive:
            archive.extractall(filter="data")
    return tmp_path


def command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sae", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert not stop.value.code


def steps_done(said: str) -> list[str]:
    return [line.split()[2] for line in said.splitlines() if "done before" in line]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def identity(checkpoint: Path) -> str:
    return json.loads((checkpoint / "manifest.json").read_text())["identity"]


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_fixtures_are_small():
    sizes = {path.name: path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()}
    assert max(sizes.values()) <= 50_000, sizes


def test_the_cache_opens_and_holds_the_recorded_rows():
    cache = activations_cache.open("run/cache")
    assert cache.verify() == []
    assert list(cache.hook_points) == HOOK_POINTS
    assert cache.fingerprint == EXPECTED["fingerprint"]
    for name in HOOK_POINTS:
        rows = cache[name][cache.rows()]
        assert sha256(rows.numpy().tobytes()) == EXPECTED["rows_sha256"][name]
        files = contents(Path("run/cache", name, "acts", "c"))
        stored = b"".join(files[file] for file in sorted(files))
        assert sha256(stored) == EXPECTED["acts_sha256"][name]


def test_the_cache_is_the_one_that_its_configuration_asks_for(monkeypatch, capsys, written):
    before = contents(written / "run" / "cache")
    command(monkeypatch, "cache", "run.yaml")
    assert EXPECTED["fingerprint"] in capsys.readouterr().out
    assert contents(written / "run" / "cache") == before


@torch.no_grad()
def test_the_dictionary_loads_and_codes_rows_as_recorded():
    dictionary = sae.load("run/train/topk")
    x = activations_cache.open("run/cache")[HOOK_POINTS[0]][:N_ROWS]
    latents = dictionary.encode(x)
    assert latents.indices.tolist() == EXPECTED["indices"]
    for result, name in ((latents.values, "values"), (dictionary(x), "x_hat")):
        if numerics() == EXPECTED["numerics"]:
            assert result.numpy().tobytes().hex() == EXPECTED[name], name
        else:
            data = bytes.fromhex(EXPECTED[name])
            recorded = torch.tensor(struct.unpack(f"<{result.numel()}f", data)).view(result.shape)
            torch.testing.assert_close(result, recorded, rtol=1e-5, atol=1e-6)
    assert dictionary.decode(latents).equal(dictionary(x))


def test_what_lies_beside_the_dictionary_is_read():
    firing = Firing.read("run/train/topk")
    stored = load_file("run/train/topk/stats.safetensors")
    assert firing.n_rows > 0
    assert firing.density.shape == (32,)
    assert all(tensor.isfinite().all() for tensor in stored.values())
    record = json.loads(Path("run/train/topk/provenance.json").read_text())
    weights = Path("run/train/topk/sae.safetensors").read_bytes()
    assert record["sae_sha256"] == sha256(weights)
    assert record["cache"] == EXPECTED["fingerprint"]


def test_the_stopped_training_goes_on_to_the_weights_of_a_whole_one(monkeypatch):
    [checkpoint] = Path("stopped/train/checkpoints").iterdir()
    command(monkeypatch, "train", "stopped.yaml", "output=whole")
    command(monkeypatch, "train", "stopped.yaml")
    began = [path.name for path in Path("stopped/train/logs/csv").iterdir()]
    assert began == [f"from-{checkpoint.name}"]
    [last] = Path("whole/train/checkpoints").iterdir()
    assert identity(checkpoint) == identity(last)
    for name, recorded in EXPECTED["weights_sha256"].items():
        weights = Path("train", name, "sae.safetensors")
        resumed, whole = "stopped" / weights, "whole" / weights
        if numerics() == EXPECTED["numerics"]:
            assert sha256(resumed.read_bytes()) == sha256(whole.read_bytes()) == recorded, name
        else:
            torch.testing.assert_close(load_file(resumed), load_file(whole), **NEAR)


def test_the_run_is_done(monkeypatch, capsys, written):
    before = contents(written / "run")
    command(monkeypatch, "run", "run.yaml", EXPECTED["override"])
    said = capsys.readouterr().out
    assert steps_done(said) == [*STEPS]
    report = json.loads(Path("run/evaluate/report.json").read_text())
    for name, result in report["reconstruction"].items():
        [row] = [line.split() for line in said.splitlines() if line.split()[:1] == [name]]
        assert row[1] == f"{result['fvu']:.3f}"
    after = contents(written / "run")
    rewritten = {path.name for path in after if after[path] != before.get(path)}
    assert after.keys() == before.keys()
    assert rewritten <= {"run.yaml"}  # it holds every key, so it is of the commit that runs


def test_another_request_is_not_taken_for_done(monkeypatch, capsys):
    # The identities must tell requests apart as well; the steps before the changed one stay done.
    command(monkeypatch, "evaluate", "run.yaml", "evaluate.seed=1")
    assert steps_done(capsys.readouterr().out) == ["cache", "train"]
