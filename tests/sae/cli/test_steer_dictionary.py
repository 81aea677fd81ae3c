"""`sae steer DICT` and `sae find DICT`, and what they refuse."""

import csv
import json
import sys

import pytest
import torch

from sae.architecture import SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.cli import main
from sae.metrics import Firing
from sae.pretrained import save

HOOK = "model.layers.1:out"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model, tiny_model_config):
    path = tmp_path_factory.mktemp("dictionaries") / "mine"
    dictionary = SparseAutoencoder(SAEConfig(d_in=23, d_sae=53, activation=TopK(k=5)))
    initialise(dictionary, torch.Generator().manual_seed(1))
    model = {**tiny_model.identity, "path": tiny_model_config.path}
    save(dictionary, path, {"hook_point": HOOK, "model": model})
    stats = Firing(53)
    stats.update(
        dictionary.encode(torch.randn(997, 23, generator=torch.Generator().manual_seed(2)))
    )
    stats.save(path)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sae", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        printed = capsys.readouterr()
        return stop.value.code, " ".join(printed.out.split()), " ".join(printed.err.split())

    return call


def test_base_and_steered_text_stand_side_by_side(run, saved):
    code, out, err = run(
        "steer", saved, "--latent", "7=40x", "--latent", "9=off", "--prompt", "Aba cede",
        "max_new_tokens=7", "positions=generated",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "Aba cede" in out
    assert "base" in out
    assert "steered" in out
    assert "7=40x, 9=off ran on 6 tokens and changed 6" in out


def test_a_sweep_leaves_a_table_and_a_picture(run, saved, tmp_path):
    code, out, err = run(
        "steer", saved, "--latent", "7=1x", "--prompt", "Aba cede", "--sweep", "max_new_tokens=5",
        "strengths=[0,2]", "n_neutral=3", "--output", tmp_path / "out",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "largest strength with KL <= 0.5 is" in out
    with (tmp_path / "out" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["arm"], r["strength"]) for r in rows[:3]] == [
        ("latent", "0.0"), ("latent", "2.0"), ("random direction", "0.0"),
    ]  # fmt: skip
    assert float(rows[1]["kl_neutral"]) > float(rows[0]["kl_neutral"])
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["max_kl"] == 0.5
    assert (tmp_path / "out" / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_find_by_texts_by_neighbours_and_behind_a_prediction(run, saved):
    code, out, _ = run("find", saved, "--pos", "Aba cede", "--pos", "Aba dido", "n=3")
    assert code == 0
    assert "fire in all of 2 texts and in none of 0" in out
    code, out, _ = run("find", saved, "--near", "7", "n=3")
    assert code == 0
    assert "cosines of the decoder's rows" in out
    code, out, _ = run(
        "find", saved, "--prompt", "Aba cede", "target=a", "against=e", "n_ablated=9",
        "baselines=[off, zero, mean, sampled]",
    )  # fmt: skip
    assert code == 0
    assert "over 9 ablations attribution correlates" in out
    assert "mean: " in out
    assert all(f"IG, {name}" in out or name in out for name in ("off", "zero", "sampled"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latent", "99=10x"], "latent must be below d_sae=53, got 99"),
        (["--latent", "7=10x mean"], "units of max or norm such as '10x max', got '10x mean'"),
        (["--latent", "7"], "latents must have the form NUMBER=CHANGE such as 123=10x"),
        ([], "latents must name at least one"),
        (["--latent", "7=1x", "positions=promt"], "positions must be one of"),
        (["--latent", "7=1x", "strenths=[1]"], "did you mean 'strengths'"),
        (
            ["--latent", "7=1x", "hook_point=model.layers.2:out"],
            f"hook_point must be {HOOK}, where",
        ),
        (["--latent", "7=1x", "--latent", "8=1x", "--sweep"], "latents must be one to sweep"),
    ],
    ids=range(8),
)
def test_a_wrong_request_costs_one_line(run, saved, arguments, message):
    code, _, err = run("steer", saved, *arguments, "--prompt", "Aba")
    assert code in {1, 2}
    assert message in err
    assert err.startswith("error: ")


def test_a_config_takes_no_options_of_a_dictionary(run):
    code, _, err = run("steer", "demo.yaml", "--latent", "7=1x")
    assert code == 2
    assert "--latent must stand beside a dictionary, got the config demo.yaml" in err


def test_another_model_or_none_is_refused(run, saved, tmp_path, tiny_model):
    record = json.loads((saved / "provenance.json").read_text())
    model_sha256 = tiny_model.identity["model_sha256"]
    for name, model, message in (
        ("other", {**record["model"], "model_sha256": "0" * 64}, f"{'0' * 64}, got {model_sha256}"),
        ("unknown", {}, "--model must name the model of"),
    ):
        copy = tmp_path / name
        copy.mkdir()
        for file in ("config.json", "sae.safetensors"):
            (copy / file).write_bytes((saved / file).read_bytes())
        (copy / "provenance.json").write_text(json.dumps({**record, "model": model}))
        code, _, err = run("steer", copy, "--latent", "7=4.5", "--prompt", "Aba")
        assert code == 1
        assert message in err
    code, _, err = run(
        "steer", copy, "--latent", "7=2x", "--prompt", "Aba", "--model", record["model"]["path"]
    )
    assert code == 1
    assert "stats must be given" in err


def test_the_snippet_of_the_documentation_runs(saved, repository, capsys):
    text = (repository / "docs" / "steering.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    for written, here in (("runs/demo/train/topk", str(saved)), ("latent=123", "latent=7")):
        assert written in code
        code = code.replace(written, here)
    exec(compile(code, "steering.md", "exec"), {})
    assert "n_chosen=19" in capsys.readouterr().out
