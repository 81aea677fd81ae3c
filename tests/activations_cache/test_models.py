"""Models load from a directory, a package or the hub; the identity follows contents, not places."""

import hashlib
import importlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from activations_cache.config import ModelConfig
from activations_cache.loading import ModelError, quiet
from activations_cache.models import LoadedModel, load_model, tokenizer_sha256


@pytest.fixture
def directory(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))


def load(directory: Path, **options: str) -> LoadedModel:
    return load_model(ModelConfig(path=str(directory), **options))


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def test_a_directory_gives_its_weights_in_the_dtype_asked_for(tiny_model_dir):
    weights = load_file(tiny_model_dir / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model = load(tiny_model_dir, dtype=str(dtype).removeprefix("torch.")).model
        assert type(model).__name__ == "LlamaForCausalLM"
        result = model.state_dict()
        assert all(torch.equal(result[name], w.to(dtype)) for name, w in weights.items())
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_tokenizer_is_the_saved_one(tiny_model_dir, tiny_tokenizer):
    text = "Aeio bund, lo tis \n\n Emug?"
    assert load(tiny_model_dir).tokenizer(text).input_ids == tiny_tokenizer(text).input_ids


def test_the_identity_is_made_of_hashes_and_no_path(tiny_model_dir):
    loaded = load(tiny_model_dir, dtype="float32")
    weights = (tiny_model_dir / "model.safetensors").read_bytes()
    assert loaded.identity["model_sha256"] == hashlib.sha256(weights).hexdigest()
    assert loaded.identity["model"] == "LlamaForCausalLM"
    assert loaded.identity["dtype"] == "float32"
    assert set(loaded.identity) == {
        "model",
        "model_sha256",
        "config_sha256",
        "tokenizer_sha256",
        "dtype",
    }
    assert not any(str(tiny_model_dir) in value for value in loaded.identity.values())
    assert loaded.provenance == {"path": str(tiny_model_dir)}


def test_a_moved_model_is_the_same_model(tiny_model_dir, directory):
    change_json(directory / "config.json", transformers_version="0.0", _name_or_path="elsewhere")
    assert load(directory).identity == load(tiny_model_dir).identity


@pytest.mark.parametrize("part", ["weights", "config", "tokenizer", "dtype"])
def test_another_model_has_another_identity(tiny_model_dir, directory, part):
    expected = load(tiny_model_dir).identity
    options = {}
    if part == "weights":
        weights = load_file(directory / "model.safetensors")
        weights["model.norm.weight"][3] += 1e-3
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    elif part == "config":
        change_json(directory / "config.json", rms_norm_eps=1e-3)
    elif part == "tokenizer":
        tokenizer = json.loads((directory / "tokenizer.json").read_bytes())
        tokenizer["pre_tokenizer"]["add_prefix_space"] = True
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        options = {"dtype": "float32"}
    result = load(directory, **options).identity
    key = {"weights": "model_sha256", "dtype": "dtype"}.get(part, f"{part}_sha256")
    assert {name for name in expected if result[name] != expected[name]} == {key}


def test_using_a_tokenizer_does_not_change_its_hash(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    before = tokenizer_sha256(tokenizer)
    tokenizer(["Aeio", "bund lo tis"], padding=True, truncation=True, max_length=2)
    assert tokenizer_sha256(tokenizer) == before


def test_a_model_in_several_files_is_hashed_as_one(directory):
    weights = load_file(directory / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:7]}
    parts["model-00002-of-00002.safetensors"] = names[7:]
    for file, weights_of_file in parts.items():
        save_file(
            {name: weights[name] for name in weights_of_file}, directory / file, {"format": "pt"}
        )
    index = {
        "metadata": {},
        "weight_map": {n: f for f, weights_of_file in parts.items() for n in weights_of_file},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()
    loaded = load(directory, dtype="float32")
    joined = b"".join((directory / file).read_bytes() for file in parts)
    assert loaded.identity["model_sha256"] == hashlib.sha256(joined).hexdigest()
    assert torch.equal(loaded.model.state_dict()[names[9]], weights[names[9]])

    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="every file of its index, got no model-00002-of-00002"):
        load(directory)


def test_a_package_can_carry_a_directory(directory, monkeypatch, tmp_path):
    package = tmp_path / "carrier_of_models"
    (package / "inner").mkdir(parents=True)
    # Found without being imported: what it imports may be absent.
    (package / "__init__.py").write_text("import absent_dependency")
    shutil.move(directory, package / "inner" / "tiny")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    config = ModelConfig(path="package://carrier_of_models/inner/tiny")
    assert load_model(config).model.config.hidden_size == 23


def test_the_wrong_hash_is_refused_with_both(tiny_model_dir):
    digest = hashlib.sha256((tiny_model_dir / "model.safetensors").read_bytes()).hexdigest()
    assert load(tiny_model_dir, sha256=digest).identity["model_sha256"] == digest
    with pytest.raises(ModelError, match=f"must have sha256 {'1' * 64}, got {digest}; fetch"):
        load(tiny_model_dir, sha256="1" * 64)


@pytest.mark.parametrize("path", ["org/absent_model", "./absent/folder", "/absent/folder"])
def test_an_unknown_place_is_refused_in_one_line(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=f"model path {path} must be a directory, .*got") as error:
        load_model(ModelConfig(path=path))
    assert "\n" not in str(error.value)


def without_norm(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def in_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def cut(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def without_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


def config(**changes: object) -> Callable[[Path], None]:
    return lambda directory: change_json(directory / "config.json", **changes)


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


READABLE = r"must be readable by transformers \d"
CONFIG = r"must have a readable config\.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (in_pickle, r"must have model\.safetensors or its index, got .*pytorch_model\.bin.*pickle"),
        (cut, f"{READABLE}.*, got SafetensorError"),
        (without_norm, r"all weights of LlamaForCausalLM, got none for model\.norm\.weight"),
        (config(intermediate_size=41), f"{READABLE}.*, got RuntimeError"),
        (lambda directory: (directory / "config.json").unlink(), f"{CONFIG}, got FileNotFound"),
        (write("config.json", "{"), f"{CONFIG}, got JSONDecodeError"),
        (config(num_attention_heads=7), f"{READABLE}.*heads"),
        (config(architectures=None), "architectures in config.json must name .*, got none"),
        (config(architectures=["LlamaTokenizer"]), "must name .*, got LlamaTokenizer"),
        (without_tokenizer, READABLE),
        (write("tokenizer.json", '{"model": 1}'), READABLE),
    ],
)
def test_damaged_directories_cost_one_line(directory, damage, message):
    damage(directory)
    with pytest.raises(ModelError, match=message) as error:
        load(directory)
    assert "\n" not in str(error.value)


def test_loading_is_silent_and_leaves_the_settings_alone(tiny_model_dir, capfd, caplog):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(tiny_model_dir)
    assert caught == []
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.name.startswith("transformers")]

    def fails() -> None:
        with quiet():
            assert not transformers_logging.is_progress_bar_enabled()
            raise KeyError

    before = transformers_logging.get_verbosity()
    with pytest.raises(KeyError):
        fails()
    assert transformers_logging.get_verbosity() == before
    assert transformers_logging.is_progress_bar_enabled()


def test_progress_ends_at_its_total(tiny_model_dir):
    calls = []
    load_model(ModelConfig(path=str(tiny_model_dir)), progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1]
    assert calls[-1][2] == "MB hashed"


@pytest.mark.real
def test_smollm2_knows_the_capital_of_france(smollm2):
    prompt = smollm2.tokenizer("The capital of France is", return_tensors="pt")
    out = smollm2.model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert "Paris" in smollm2.tokenizer.decode(out[0])
    assert smollm2.model.dtype == torch.bfloat16
    assert len(smollm2.model.model.layers) == 30


@pytest.mark.real
def test_smollm2_finds_prose_likelier_than_its_words_in_disorder(smollm2):
    text = "It was the best of times, it was the worst of times, it was the age of wisdom"
    losses = []
    for words in (text.split(), sorted(text.split())):
        ids = smollm2.tokenizer(" ".join(words), return_tensors="pt").input_ids
        losses.append(smollm2.model(ids, labels=ids).loss.item())
    assert losses[0] + 2 < losses[1]
