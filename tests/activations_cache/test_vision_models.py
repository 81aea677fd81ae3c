"""Vision towers of every family load alone, read other sizes, and say what their stream holds."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from activations_cache import vision
from activations_cache.checks import MissingPackageError
from activations_cache.config import ImagePreprocessing, ModelConfig
from activations_cache.hooks import capture, hook_points_of
from activations_cache.loading import ModelError
from activations_cache.vision import (
    ImageReading,
    LoadedVisionModel,
    load_any_model,
    load_vision_model,
)

SIZE, PATCH, D_MODEL = 21, 7, 44  # DINOv3 wants a head width that 4 divides
WIDE = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": 3,
    "num_attention_heads": 11,
    "intermediate_size": 29,
}
VISION = {**WIDE, "image_size": SIZE, "patch_size": PATCH}
DINO = {name: value for name, value in VISION.items() if name != "intermediate_size"}
TEXT = {**WIDE, "vocab_size": 31, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
TWO_TOWERS = {"vision_config": VISION, "text_config": TEXT}

FAMILIES = {
    # saved as: (config, settings, the tower that is loaded, positions before the patches)
    "ViTModel": ("ViTConfig", VISION, "ViTModel", 1),
    "ViTForImageClassification": ("ViTConfig", VISION, "ViTModel", 1),
    "Dinov2Model": ("Dinov2Config", DINO, "Dinov2Model", 1),
    "Dinov2ForImageClassification": ("Dinov2Config", DINO, "Dinov2Model", 1),
    "Dinov2WithRegistersModel": (
        "Dinov2WithRegistersConfig",
        DINO | {"num_register_tokens": 3},
        "Dinov2WithRegistersModel",
        4,
    ),
    "DINOv3ViTModel": (
        "DINOv3ViTConfig",
        VISION | {"num_register_tokens": 3},
        "DINOv3ViTModel",
        4,
    ),
    "CLIPModel": ("CLIPConfig", TWO_TOWERS, "CLIPVisionModel", 1),
    "CLIPVisionModel": ("CLIPVisionConfig", VISION, "CLIPVisionModel", 1),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", VISION, "CLIPVisionModel", 1),
    "SiglipModel": ("SiglipConfig", TWO_TOWERS, "SiglipVisionModel", 0),
    "SiglipVisionModel": ("SiglipVisionConfig", VISION, "SiglipVisionModel", 0),
}


def saved(kind: str, directory: Path) -> nn.Module:
    config, settings = FAMILIES[kind][:2]
    torch.manual_seed(11)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    model.save_pretrained(directory)
    return model


def load(directory: Path, **options: str) -> LoadedVisionModel:
    return load_vision_model(ModelConfig(path=str(directory), **{"dtype": "float32", **options}))


def pixels(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5))


def streams(loaded: LoadedVisionModel, size: int) -> list[torch.Tensor]:
    points = [point for point in hook_points_of(loaded.model) if point.count(".") < 4]
    with capture(loaded.model, points) as run:
        return list(run(pixels(size), **loaded.reading.options(size)).values())


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_tower_is_loaded_alone_with_its_own_weights(kind: str, tmp_path: Path):
    original = saved(kind, tmp_path)
    loaded = load(tmp_path)
    tower, n_prefix = FAMILIES[kind][2:]
    assert type(loaded.model).__name__ == tower
    assert loaded.identity["model"] == tower
    assert loaded.reading.n_prefix == n_prefix
    assert loaded.reading.has_class_token == (n_prefix > 0)
    assert (loaded.reading.patch, loaded.reading.image_size) == (PATCH, SIZE)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    theirs = getattr(original, "vision_model", original)
    with capture(theirs, [hook_points_of(theirs)[9]]) as run:
        [expected] = run(pixels(SIZE)).values()
    with capture(loaded.model, [hook_points_of(loaded.model)[9]]) as run:
        [result] = run(pixels(SIZE)).values()
    assert torch.equal(result, expected)
    assert result.std() > 0.1


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_stream_has_the_positions_that_are_told(kind: str, tmp_path: Path):
    saved(kind, tmp_path)
    loaded = load(tmp_path)
    for size in (SIZE, SIZE + PATCH):
        n_positions = loaded.reading.n_positions(size)
        assert n_positions == FAMILIES[kind][3] + (size // PATCH) ** 2
        result = streams(loaded, size)
        assert len(result) > 9
        assert {tuple(s.shape) for s in result} == {(2, n_positions, D_MODEL)}


@pytest.mark.parametrize("kind", ["ViTModel", "Dinov2WithRegistersModel", "SiglipVisionModel"])
def test_patches_stand_row_by_row_behind_the_prefix(kind: str, tmp_path: Path):
    """Changing a patch of the image changes the stream at that patch's position first."""
    saved(kind, tmp_path)
    loaded = load(tmp_path)
    changed = pixels(SIZE)
    changed[:, :, 2 * PATCH :, PATCH : 2 * PATCH] += 3  # the patch in row 2, column 1
    with capture(loaded.model, hook_points_of(loaded.model)[:1]) as run:
        [before], [after] = (list(run(x).values()) for x in (pixels(SIZE), changed))
    moved = (after - before).abs().amax(dim=(0, 2)).nonzero().flatten().tolist()
    assert moved == [loaded.reading.n_prefix + 2 * 3 + 1]


def test_the_settings_for_images_are_read_or_have_the_models_size(tmp_path: Path):
    saved("ViTModel", tmp_path)
    assert load(tmp_path).settings == ImagePreprocessing(size=SIZE)
    settings = {"size": 28, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load(tmp_path).settings.size == 28
    assert load(tmp_path).settings.mean == (0.5, 0.4, 0.3)


def test_dtype_and_identity(tmp_path: Path):
    saved("CLIPModel", tmp_path)
    one, other = load(tmp_path), load(tmp_path, dtype="bfloat16")
    assert other.dtype == torch.bfloat16
    assert {k for k in one.identity if one.identity[k] != other.identity[k]} == {"dtype"}
    assert set(one.identity) == {"model", "model_sha256", "config_sha256", "dtype"}
    moved = shutil.copytree(tmp_path, tmp_path / "moved")
    assert load(moved).identity == one.identity
    with pytest.raises(ModelError, match=f"must have sha256 {'1' * 64}, got "):
        load(tmp_path, sha256="1" * 64)


def test_blocks_are_compiled_on_demand_and_the_identity_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saved("ViTModel", tmp_path)
    compiled: list[nn.Module] = []
    monkeypatch.setattr(vision, "compile_blocks", compiled.append)
    loaded = load_vision_model(ModelConfig(path=str(tmp_path), compile=True))
    assert compiled == [loaded.model]
    assert loaded.identity["compiled"] == "blocks"


@pytest.mark.parametrize("kind", ["Dinov2Model", "CLIPModel", "SiglipVisionModel"])
def test_a_tower_over_all_devices_gives_the_same_stream(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saved(kind, tmp_path)
    asked, read = [], vision.read_model

    def reading(*arguments: Any, **options: Any):
        asked.append(options)
        return read(*arguments, **options)

    monkeypatch.setattr(vision, "read_model", reading)
    one, spread = load(tmp_path), load(tmp_path, devices="all")
    assert asked[1] == {**asked[0], "device_map": "auto"}  # accelerate's word for it
    assert spread.identity == one.identity
    for spread_stream, expected in zip(streams(spread, SIZE), streams(one, SIZE), strict=True):
        assert torch.equal(spread_stream.cpu(), expected)


def test_other_libraries_are_not_spread_over_devices(tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"devices must be one for a vision model of timm, got 'a"):
        load(tmp_path, devices="all")


def test_sizes_that_cannot_be_read_are_refused():
    reading = ImageReading(
        patch=7, n_prefix=1, has_class_token=True, image_size=21, resizes="by itself"
    )
    with pytest.raises(ValueError, match="size must be a multiple of the patch's 7 pixels, got 24"):
        reading.n_positions(24)
    fixed = ImageReading(patch=7, n_prefix=1, has_class_token=True, image_size=21, resizes="never")
    assert fixed.n_positions(21) == 10
    with pytest.raises(ValueError, match="size must be 21, as this model's positions are fixed"):
        fixed.n_positions(28)


def test_a_language_model_is_refused(tiny_model_dir: Path):
    with pytest.raises(ModelError, match=r"model_type in config.json must be one of .*vit.*llama"):
        load(tiny_model_dir)


def test_either_kind_is_loaded_by_what_the_files_hold(tiny_model_dir: Path, tmp_path: Path):
    saved("SiglipModel", tmp_path)
    tower = load_any_model(ModelConfig(path=str(tmp_path)))
    assert type(tower.model).__name__ == "SiglipVisionModel"
    language = load_any_model(ModelConfig(path=str(tiny_model_dir)))
    assert type(language.model).__name__ == "LlamaForCausalLM"


def test_a_tower_without_all_weights_is_refused(tmp_path: Path):
    saved("Dinov2Model", tmp_path)
    config = json.loads((tmp_path / "config.json").read_bytes()) | {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"all weights of Dinov2Model, got none for encoder\."):
        load(tmp_path)


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_a_missing_library_is_named_in_one_line(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saved("ViTModel", tmp_path)
    if library == "timm":
        (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    else:
        (tmp_path / "config.json").rename(tmp_path / "open_clip_config.json")
        (tmp_path / "model.safetensors").rename(tmp_path / "open_clip_model.safetensors")
    monkeypatch.setattr(vision.importlib.util, "find_spec", lambda name: None)
    expected = f"must have the package {library}, got none; run `pip install 'monosema\\[timm\\]'`"
    with pytest.raises(MissingPackageError, match=expected) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
