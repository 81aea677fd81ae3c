"""Towers of timm and open_clip, where these are installed (the extra `timm`)."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from activations_cache.config import ImagePreprocessing, ModelConfig
from activations_cache.hooks import capture, hook_points_of
from activations_cache.vision import LoadedVisionModel, load_any_model, load_vision_model

SIZE = 32


def needs(package: str) -> pytest.MarkDecorator:
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f"needs the package {package}")


@pytest.fixture
def timm_dir(tmp_path: Path) -> Path:
    """A random ViT of 3 blocks, saved as timm saves for the hub."""
    timm = importlib.import_module("timm")
    torch.manual_seed(3)
    sizes = {"img_size": SIZE, "depth": 3, "embed_dim": 66, "reg_tokens": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)
    timm.models.save_for_hf(model, tmp_path, model_args=sizes, safe_serialization=True)
    return tmp_path


@pytest.fixture
def open_clip_dir(tmp_path: Path) -> Path:
    """A random CLIP whose tower for images has 3 blocks, in the files of its hub."""
    torch.manual_seed(3)
    vision = {"image_size": SIZE, "layers": 3, "width": 66, "patch_size": 8, "head_width": 33}
    text = {"context_length": 7, "vocab_size": 31, "width": 22, "heads": 2, "layers": 1}
    config = {"embed_dim": 17, "vision_cfg": vision, "text_cfg": text}
    model = importlib.import_module("open_clip").CLIP(**config)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    pixels = {"mean": [0.5, 0.4, 0.3], "std": [0.2] * 3, "resize_mode": "shortest"}
    entries = {"model_cfg": config, "preprocess_cfg": pixels}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(entries))
    return tmp_path


def load(directory: Path) -> LoadedVisionModel:
    return load_vision_model(ModelConfig(path=str(directory), dtype="float32"))


def check_blocks(loaded: LoadedVisionModel, size: int) -> None:
    """Each block adds its attention and its MLP to a stream of the length that is told."""
    points = hook_points_of(loaded.model)
    assert len(points) == 15
    with capture(loaded.model, points) as run:
        seen = run(torch.randn(2, 3, size, size), **loaded.reading.options(size))
    n_positions = loaded.reading.n_positions(size)
    assert {tuple(stream.shape) for stream in seen.values()} == {(2, n_positions, 66)}
    for block in range(3):
        before, attention, _, mlp, after = (seen[p] for p in points[5 * block : 5 * block + 5])
        assert torch.allclose(before + attention + mlp, after, atol=1e-5)


@needs("timm")
def test_a_tower_of_timm(timm_dir: Path):
    loaded = load(timm_dir)
    assert (loaded.reading.patch, loaded.reading.n_prefix) == (16, 3)
    assert loaded.reading.has_class_token
    assert loaded.identity["model"] == "timm/vit_tiny_patch16_224"
    assert (loaded.settings.size, loaded.settings.mean) == (SIZE, (0.5, 0.5, 0.5))
    check_blocks(loaded, SIZE)
    check_blocks(loaded, SIZE + 16)


@needs("open_clip")
def test_a_tower_of_open_clip(open_clip_dir: Path):
    loaded = load(open_clip_dir)
    assert (loaded.reading.patch, loaded.reading.n_prefix) == (8, 1)
    assert loaded.settings == ImagePreprocessing(
        size=SIZE,
        crop=True,
        shortest_edge=SIZE,
        interpolation="bicubic",
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.2),
    )
    check_blocks(loaded, SIZE)
    with pytest.raises(ValueError, match="size must be 32, as this model's positions are fixed"):
        loaded.reading.n_positions(40)


@needs("timm")
def test_the_kind_is_told_by_the_files(timm_dir: Path):
    loaded = load_any_model(ModelConfig(path=str(timm_dir)))
    assert isinstance(loaded, LoadedVisionModel)
