"""`sae steer DICT targets=[...]`: which words a tower sees in pictures with latents changed."""

import sys

import pytest
import torch
from PIL import Image

from activations_cache.config import ModelConfig
from activations_cache.towers import ZeroShot, load_towers
from sae import run as sae_run
from sae.architecture import SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.cli import main
from sae.pretrained import load, save
from sae.steer import Edit, Patches, Steering
from tests import pairs
from tests.shapes import pictures

HOOK = "encoder.layers.0:out"
WORDS = ["red", "dark disc", "dot"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MONOSEMA_CACHE", str(tmp_path / "user"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("steered")
    dictionary = SparseAutoencoder(SAEConfig(d_in=22, d_sae=53, activation=TopK(k=5)))
    initialise(dictionary, torch.Generator().manual_seed(1))
    save(dictionary, path / "mine", {"hook_point": HOOK})
    return path / "mine", pairs.clip(path / "clip", ["dark red disc dot"]), pictures(path)[1:3]


@pytest.fixture
def sae(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sae", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        printed = capsys.readouterr()
        return stop.value.code, " ".join(printed.out.split()), printed.err

    return call


def test_words_of_pictures_before_and_after_are_those_by_hand(sae, made):
    path, tower, files = made
    towers = load_towers(ModelConfig(path=str(tower), dtype="float32"))
    model = ZeroShot(towers, towers.texts(WORDS))
    pixels = torch.stack([torch.from_numpy(towers.preprocessing(Image.open(f))) for f in files])
    base = model(pixels).logits[:, 0]
    edits = [Edit(load(path).at(HOOK), latent=5, clamp=9.0)]
    with Steering(model, edits, positions=Patches(n_prefix=1)):
        rise = model(pixels).logits[:, 0] - base
    assert rise.abs().min() > 1e-4
    result = sae_run.steer_pictures(
        path, latents=["5=9.0"], prompts=list(map(str, files)), targets=WORDS, model=str(tower)
    )
    torch.testing.assert_close(result.base, base)
    torch.testing.assert_close(result.steered - result.base, rise)
    assert (result.changed.n_chosen, result.changed.n_changed) == (32, 32)
    prompts = [part for file in files for part in ("--prompt", file)]
    words = f"targets=[{', '.join(WORDS)}]"
    code, out, _ = sae("steer", path, "--latent", "5=9.0", *prompts, words, "--model", tower)
    assert code == 0
    assert "ran on 32 patches and changed 32" in out
    for row in result.section.table.rows:
        assert all(cell in out for cell in row[1:])
    shares = [float(row[2]) for row in result.section.table.rows]
    assert shares == pytest.approx(base.softmax(dim=1).flatten().tolist(), abs=6e-4)
    assert "<table" in result._repr_html_()


def test_wrong_requests_are_one_line(sae, made, tiny_model_config):
    path, tower, files = made
    steer = ["steer", path, "--latent", "5=9.0", "--prompt", files[0]]
    for given, message in {
        ("targets=[red]", "positions=last", "--model", tower): "positions must stand beside texts",
        ("cache=here", "--model", tower): "cache must stand beside targets, which reads it",
        ("targets=[red]", "--model", tiny_model_config.path): "targets must name words for a model",
        ("targets=[red]", "--model", tower, "--prompt", path): "a picture must be an existing file",
    }.items():
        code, _, err = sae(*steer, *given)
        assert code in {1, 2}
        assert message in " ".join(err.split())
        assert "Traceback" not in err
