"""The main job on a tiny model: all steps, again at once, on after a kill, and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sae import load
from sae.cli import main

HOOK = "model.layers.1:out"


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model_dir, tiny_text, tiny_records) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    entry = {"d_sae": 67, "activation": {"kind": "topk", "k": 5}, "dead_after_tokens": 500}
    record = {
        "output": str(path.parent / "run"),
        "cache": {
            "model": {"path": str(tiny_model_dir), "dtype": "float32"},
            "text": {
                "sources": [
                    {"path": str(tiny_text), "document_pattern": "CHAPTER"},
                    {"path": str(tiny_records), "field": "gloss", "label": "kind"},
                ],
                "context": 31,
            },
            "hook_points": [HOOK],
            "n_rows": 4001,
            "rows_per_shard": 1009,
        },
        "train": {
            "batch": 127,
            "epochs": 3,
            "log_every": 5,
            "precision": "fp32",
            "saes": {"topk": entry, "topk-frozen": {**entry, "frozen": "decoder"}},
        },
        "evaluate": {"n_contexts": 8, "n_contexts_special": 2},
        "explain": {"min_firings": 5, "min_examples": 2},
        "steer": {"latent": 3, "max_new_tokens": 7},
    }
    path.write_text(json.dumps(record))  # JSON is YAML, without aliases
    return path


def sae(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sae", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return int(stop.value.code)


@pytest.fixture(scope="module")
def labelled(config) -> int:
    """A latent that the tiny run can label and score, so that steering has one to name."""
    subprocess.run(
        [sys.executable, "-m", "sae.cli", "explain", str(config)], check=True, timeout=150
    )
    from sae.explain import read_latents

    records = read_latents(config.parent / "run" / "explain" / "topk" / "latents.parquet")
    return next(r.latent for r in records if r.status == "scored")


def test_the_whole_job_then_again_at_once(monkeypatch, capsys, config, labelled):
    latent = f"steer.latent={labelled}"
    assert sae(monkeypatch, "run", str(config), latent) == 0
    out = capsys.readouterr().out
    assert "topk-frozen" in out
    page = config.parent / "run" / "browse" / "index.html"
    assert page.stat().st_size > 500
    assert (page.parent / "data" / "d0" / "latents" / "0.js").stat().st_size > 20_000
    weights = (config.parent / "run" / "train" / "topk" / "sae.safetensors").stat().st_mtime_ns
    began = time.monotonic()
    assert sae(monkeypatch, "run", str(config), latent) == 0
    again = capsys.readouterr().out
    assert again.count("done before") == 6
    assert time.monotonic() - began < 10
    after = (config.parent / "run" / "train" / "topk" / "sae.safetensors").stat().st_mtime_ns
    assert after == weights
    steering = json.loads((config.parent / "run" / "steer" / "steering.json").read_text())
    assert steering["shown"]["latent"] == labelled
    assert load(config.parent / "run" / "train" / "topk").config.d_sae == 67


def test_a_run_is_browsed_from_its_directory(monkeypatch, capsys, config, labelled, tmp_path):
    assert sae(monkeypatch, "browse", str(config.parent / "run"), "--out", str(tmp_path / "b")) == 0
    assert str(tmp_path / "b" / "index.html") in capsys.readouterr().out
    index = data(tmp_path / "b", "index")
    [dictionary] = index["dictionaries"]  # the frozen one is a row of the table alone
    assert (dictionary["name"], dictionary["d_sae"]) == ("topk", 67)
    assert dictionary["summary"].startswith("TopK, k = 5, ")
    assert [row[0] for row in index["results"]["rows"]] == ["topk", "topk-frozen"]
    assert [curve["metrics"][0][0] for curve in index["curves"]] == ["FVU", "FVU"]
    group = data(tmp_path / "b", "d0/latents/0")
    shown = group["latents"][labelled]
    rows = load(config.parent / "run" / "train" / "topk").dec_rows.detach()
    unit = rows / rows.norm(dim=1, keepdim=True)
    cosine = unit @ unit[labelled]
    cosine[labelled] = -1
    assert shown["nearest"][0][0] == int(cosine.argmax())
    assert shown["nearest"][0][1] == pytest.approx(float(cosine.max()), abs=1e-4)
    assert len(shown["promoted"]) == len(shown["suppressed"]) == 10
    assert shown["scores"][0]["name"] == "AUC"
    assert f"--latent {labelled}=5x" in shown["command"]
    assert any(latent and latent["cofiring"] for latent in group["latents"])
    attributed = [a for latent in group["latents"] if latent for a in latent["attributions"]]
    assert attributed
    assert any(a["effect"] is not None for a in attributed)


def test_a_dictionary_with_labels_is_browsed(monkeypatch, capsys, config, labelled, tmp_path):
    path = tmp_path / "topk"
    shutil.copytree(config.parent / "run" / "train" / "topk", path)
    assert sae(monkeypatch, "browse", str(path)) == 1
    assert "run `sae explain" in capsys.readouterr().err
    shutil.copytree(config.parent / "run" / "explain" / "topk", path / "explain")
    assert sae(monkeypatch, "browse", str(path)) == 0
    index = data(path / "browse", "index")
    assert (index["results"], index["curves"]) == (None, [])
    shown = data(path / "browse", "d0/latents/0")["latents"][labelled]
    assert (shown["promoted"], shown["cofiring"], shown["attributions"]) == ([], [], [])
    assert shown["examples"]
    assert shown["nearest"]


def test_a_directory_without_a_run_is_refused(monkeypatch, capsys, tmp_path):
    assert sae(monkeypatch, "browse", str(tmp_path)) == 2
    assert "RUN must be a directory with run.yaml" in capsys.readouterr().err


def data(folder: Path, key: str):
    text = (folder / "data" / f"{key}.js").read_text(encoding="utf-8")
    return json.loads(text[text.index(",'") + 2 : -3].replace("\\\\", "\\"))


def test_a_changed_part_is_made_again_and_the_parts_before_it_are_not(
    monkeypatch, capsys, config, labelled
):
    arguments = (str(config), f"output={config.parent / 'other'}",
                 f"cache_path={config.parent / 'run' / 'cache'}", "train.seed=1")  # fmt: skip
    assert sae(monkeypatch, "train", *arguments) == 0
    out = capsys.readouterr().out
    assert out.count("done before") == 1
    first = load(config.parent / "run" / "train" / "topk")
    second = load(config.parent / "other" / "train" / "topk")
    assert not first.W_dec.equal(second.W_dec)


@pytest.mark.long  # its short form, of the library alone, is in tests/faults/test_train_crash.py
def test_a_killed_training_goes_on_from_its_checkpoint_to_the_same_bits(config, labelled, tmp_path):
    arguments = [str(config), f"cache_path={config.parent / 'run' / 'cache'}",
                 "train.checkpoint_seconds=0.05", "train.epochs=20"]  # fmt: skip
    command = [sys.executable, "-m", "sae.cli", "train", *arguments]
    subprocess.run([*command, f"output={tmp_path / 'whole'}"], check=True, timeout=150)
    killed = [*command, f"output={tmp_path / 'killed'}"]
    checkpoints = tmp_path / "killed" / "train" / "checkpoints"
    for n in (1, 2):
        with subprocess.Popen(killed) as process:
            wait_for(lambda n=n: len(list(checkpoints.glob("*/manifest.json"))) >= n, process)
            process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "train" / "done.json").exists()
    subprocess.run(killed, check=True, timeout=150)
    for name in ("topk", "topk-frozen"):
        ours, theirs = (
            tmp_path / k / "train" / name / "sae.safetensors" for k in ("killed", "whole")
        )
        assert ours.read_bytes() == theirs.read_bytes()


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, "the run must still be going"
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("cache.model.path=/no/such/model", ["/no/such/model"]),
        ("cache.model.path=package://no_such_package/x.gguf", ["no_such_package", "pip install"]),
        ("cache.text.sources.0.path=/no/such.txt", ["/no/such.txt"]),
        ("cache.n_rows=90000000", ["90000000"]),
        ("cache.hook_points=[model.layers.99:out]", ["model.layers.99"]),
    ],
)
def test_bad_input_costs_one_line(monkeypatch, capsys, config, tmp_path, override, parts):
    code = sae(monkeypatch, "cache", str(config), override, f"output={tmp_path / 'run'}")
    err = capsys.readouterr().err
    assert code in (1, 2)
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err.replace(",", "")


def test_a_cache_of_another_layer_is_refused_and_stays(monkeypatch, capsys, config, labelled):
    journal = config.parent / "run" / "cache" / "manifest.json"
    before = journal.read_bytes()
    code = sae(monkeypatch, "cache", str(config), "cache.hook_points=[model.layers.2:out]",
               f"cache_path={config.parent / 'run' / 'cache'}")  # fmt: skip
    err = capsys.readouterr().err
    assert code == 1
    assert err.count("\n") == 1
    assert "model.layers.2:out" in err
    assert journal.read_bytes() == before


def test_an_interrupted_run_says_how_to_go_on(config, tmp_path):
    arguments = [str(config), f"output={tmp_path / 'run'}", "train.epochs=400"]
    # A shell starts background jobs with SIGINT ignored, and what they start inherits that.
    listening = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from sae.cli.main import main; main()"
    )
    command = [sys.executable, "-c", listening, "train", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        wait_for((tmp_path / "run" / "train" / "logs").exists, process)  # minutes before the end
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.strip().splitlines()[-1].startswith("error: interrupted; run the same command again")


def test_the_readme_encodes_and_decodes_rows_of_a_run(config, labelled, repository):
    blocks = (repository / "README.md").read_text().split("```python\n")[1:]
    [block] = [text for text in (b.split("```")[0] for b in blocks) if "x_hat" in text]
    run = config.parent / "run"
    code = block.replace("runs/demo", str(run)).replace("model.layers.15:out", HOOK)
    assert code != block
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["x_hat"].shape == names["x"].shape
