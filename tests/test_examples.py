"""Every example runs as it stands, and says what its text promises."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
SAYS = {
    "concept_embedding": "recovered",
    "cross_layer_and_end_to_end": "the model loses",
    "explain_with_vllm": "5 labelled, 0 failed; detection 0.",
    "hyperdimensional_probe": "3 pairs in 1024 dimensions: 100% recalled",
    "custom_parts": "detection 1.00",
    "steer": "recovered 100%",
    "sweep_with_optuna": "best of 8 trials: FVU 0.",
    "train_on_images": "latent ",
    "train_tiny": "recovered",
}

AS_NOTEBOOKS = {
    "concepts", "explain_and_browse", "gemma_scope_and_steer", "images_with_words",
    "similarity", "train_on_a_model",
}  # fmt: skip
"""Those that the site shows with their outputs; tests/docs/test_tutorials.py runs them."""


def test_every_example_is_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SAYS) | AS_NOTEBOOKS


@pytest.mark.filterwarnings("ignore::UserWarning")  # as Python itself shows them: no errors
@pytest.mark.parametrize("name", SAYS)
def test_example_runs(name, capfd, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr("sys.argv", [f"{name}.py"])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert SAYS[name] in capfd.readouterr().out
