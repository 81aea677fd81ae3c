"""Pairs of towers give texts and images what transformers gives them, or are refused by name."""

import gzip
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedTokenizerFast, ViTConfig, ViTModel

from activations_cache import towers
from activations_cache.config import ModelConfig
from activations_cache.loading import ModelError
from activations_cache.towers import Towers, load_towers, read_concepts
from tests import pairs

WORDS = ("red", "disc", "dark", "square", "a photo of two dogs on green table")
TEXTS = ["red disc", "dark", "a photo of red square", "two"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MONOSEMA_CACHE", str(tmp_path / "user"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("pairs")
    return {kind: getattr(pairs, kind)(path / kind, WORDS) for kind in ("clip", "siglip")}


def load(path: Path) -> Towers:
    return load_towers(ModelConfig(path=str(path), dtype="float32"))


def rows_of(features) -> torch.Tensor:
    return torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=1)


@pytest.mark.parametrize(("kind", "padding"), [("clip", "longest"), ("siglip", "max_length")])
def test_texts_are_as_transformers_embeds_them_each_by_itself(made, kind, padding):
    loaded = load(made[kind])
    assert (loaded.padding, loaded.context) == (padding, 13)
    assert loaded.scale == pytest.approx(np.exp(2.6592) if kind == "clip" else np.e, rel=1)
    result = loaded.texts(TEXTS)
    model = AutoModel.from_pretrained(made[kind]).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made[kind])
    how = {"padding": "max_length", "max_length": 13} if kind == "siglip" else {}
    for text, row in zip(TEXTS, result, strict=True):
        with torch.no_grad():
            inputs = tokenizer([text], return_tensors="pt", **how)
            expected = rows_of(model.get_text_features(**inputs))
        assert row == pytest.approx(expected[0], abs=1e-6)
    assert (result @ result.T - torch.eye(4)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_images_are_as_transformers_embeds_them_and_known_again(made, kind, monkeypatch):
    loaded = load(made[kind])
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (31, 41, 3), np.uint8)) for _ in range(5)]
    digests = [hashlib.sha256(p.tobytes()).hexdigest() for p in pictures]
    seen = []

    def image(example: int) -> Image.Image:
        seen.append(example)
        return pictures[example]

    result = loaded.images(image, [4, 0, 2], [digests[i] for i in (4, 0, 2)])
    model = AutoModel.from_pretrained(made[kind]).eval()
    small = np.stack([np.asarray(pictures[i].resize((28, 28), 3)) for i in (4, 0, 2)])
    pixels = torch.from_numpy((small / 127.5 - 1).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        expected = rows_of(model.get_image_features(pixel_values=pixels))
    assert result == pytest.approx(expected, abs=1e-5)
    assert sorted(seen) == [0, 2, 4]
    again = load(made[kind]).images(image, [4, 0, 2], [digests[i] for i in (4, 0, 2)])
    assert (again == result).all()
    assert len(seen) == 3
    [file] = (towers.cache_directory() / "embeddings").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"x")  # damaged: made again
    assert (loaded.images(image, [4, 0, 2], [digests[i] for i in (4, 0, 2)]) == result).all()
    assert len(seen) == 6


def test_templates_are_averaged(made):
    loaded = load(made["clip"])
    result = loaded.concepts(["red", "dark"], ["{}", "a photo of {}"])
    each = [loaded.texts(["red", "dark"]), loaded.texts(["a photo of red", "a photo of dark"])]
    assert result.names == ("red", "dark")
    mean = torch.nn.functional.normalize(each[0] + each[1], dim=1)
    assert result.embeddings == pytest.approx(mean, abs=1e-6)


def test_what_no_tower_takes_is_refused(made):
    loaded = load(made["clip"])
    with pytest.raises(ValueError, match=r"text 2 of 2 must hold a word, got none"):
        loaded.texts(["red", " "])
    with pytest.raises(ValueError, match=r"at most 13 tokens for .*, got 22: 'red red red.*shorte"):
        loaded.texts(["dark", "red " * 20])


def changed(made: dict[str, Path], kind: str, path: Path) -> Path:
    shutil.copytree(made[kind], path)
    return path


def test_another_width_on_the_two_sides_is_refused(tmp_path):
    with pytest.raises(ModelError, match="texts and images embeddings of one width, got 19 and 22"):
        load(pairs.siglip(tmp_path, WORDS, width=19))


def test_a_tower_without_a_text_side_is_refused(made, tmp_path):
    vit = ViTConfig(**pairs.EYES)
    ViTModel(vit).save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError, match=r"must have a tower for texts beside .*, got ViTModel"):
        load(tmp_path / "vit")


def test_an_end_token_that_is_never_found_is_refused(made, tmp_path):
    path = changed(made, "clip", tmp_path / "clip")
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 13  # of "square"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"different embeddings, got one for 'a' and .*: its end"):
        load(path)


def test_a_tokenizer_of_another_model_is_refused(made, tmp_path):
    path = changed(made, "clip", tmp_path / "clip")
    pairs.word_tokenizer([f"w{i}" for i in range(50)], path, begins=True)
    with pytest.raises(ModelError, match="must have a tokenizer of at most 16 tokens, got 54"):
        load(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="must be a readable model of transformers with towers"):
        load(path)


def test_weights_that_are_not_finite_are_refused(made, tmp_path):
    path = changed(made, "siglip", tmp_path / "siglip")
    weights = load_file(path / "model.safetensors")
    weights["text_model.head.weight"][3, 4] = float("nan")
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="must give finite embeddings, got nan or inf"):
        load(path)


def test_concepts_of_a_file_are_read_once_each(tmp_path):
    words, records = tmp_path / "words.txt", tmp_path / "captions.jsonl"
    words.write_bytes("\ufeffred\n\n two  dogs \nred\n".encode())
    assert read_concepts(str(words)) == ["red", "two dogs"]
    lines = [{"caption": "A dog."}, {"caption": "A cat.\nAsleep."}]
    records.write_text("\n".join(map(json.dumps, lines)))
    assert read_concepts(str(records), "caption") == ["A dog.", "A cat. Asleep."]
    packed = tmp_path / "words.txt.gz"
    packed.write_bytes(gzip.compress(b"red\nblue\n"))
    assert read_concepts(str(packed)) == ["red", "blue"]
    packed.write_bytes(b"red")
    with pytest.raises(ValueError, match=r"words\.txt\.gz must be text in UTF-8, got BadGzipFile"):
        read_concepts(str(packed))
    words.write_text("red\n\n")
    with pytest.raises(ValueError, match=r"at least two to be told apart, got 1 in .*words\.txt"):
        read_concepts(str(words))
    words.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"words\.txt must be text in UTF-8, got Unicode"):
        read_concepts(str(words))
    with pytest.raises(FileNotFoundError, match=r"concepts must be an existing file, got no\.txt"):
        read_concepts("no.txt")
    with pytest.raises(ValueError, match="text"):
        read_concepts(str(records))
