"""The images of a finished cache are found again, and refused if they have changed."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from activations_cache import io
from activations_cache.builder import build
from activations_cache.checks import CacheFormatError
from activations_cache.config import (
    CacheConfig,
    ImagePreprocessing,
    ImagesConfig,
    ImageSource,
    ModelConfig,
)
from activations_cache.hooks import capture
from activations_cache.image_rows import CachedImages
from activations_cache.reader import ActivationCache

HOOK = "layers.0:out"


@pytest.fixture
def model(tmp_path: Path) -> transformers.ViTModel:
    torch.manual_seed(3)
    config = transformers.ViTConfig(
        hidden_size=22,
        num_hidden_layers=1,
        num_attention_heads=11,
        intermediate_size=29,
        image_size=21,
        patch_size=7,
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "model")
    return model


@pytest.fixture
def cache(
    model: transformers.ViTModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ActivationCache:
    """13 drawings in a folder and 11 in an array."""
    monkeypatch.setattr(io, "fsync", lambda descriptor: None)
    values = np.random.default_rng(0).integers(0, 256, (24, 31, 29, 3), np.uint8)
    (tmp_path / "drawn").mkdir()
    for number in range(13):
        Image.fromarray(values[number]).save(tmp_path / "drawn" / f"{number}.png")
    np.save(tmp_path / "more.npy", values[13:])
    sources = (
        ImageSource(path=str(tmp_path / "drawn")),
        ImageSource(path=str(tmp_path / "more.npy")),
    )
    pixels = ImagePreprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.2))
    config = CacheConfig(
        model=ModelConfig(path=str(tmp_path / "model"), dtype="float32"),
        images=ImagesConfig(sources=sources, preprocessing=pixels),
        hook_points=(HOOK,),
        n_rows=9 * 17,
        rows_per_shard=101,
        dtype="float32",
    )
    return build(config, tmp_path / "cache")


def test_pixels_give_the_rows_again(cache: ActivationCache, model: transformers.ViTModel):
    images = CachedImages(cache)
    assert (images.grid, images.n_prefix) == ((3, 3), 1)
    rows = cache.rows()[::13]
    refs = cache.refs(rows)
    needed, at = refs.example.unique(return_inverse=True)
    with capture(model, [HOOK]) as run:
        stream = run(images.pixels(needed))[HOOK]
    assert torch.allclose(cache[HOOK][rows], stream[at, refs.position], atol=1e-5)
    assert images.records[0].source in {"drawn", "more"}


def test_moved_images_are_found_and_changed_ones_refused(cache: ActivationCache, tmp_path: Path):
    (tmp_path / "drawn").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="drawn must exist"):
        CachedImages(cache)
    paths = (tmp_path / "moved", tmp_path / "more.npy")
    images = CachedImages(cache, [ImageSource(path=str(path)) for path in paths])
    example = next(e for e, record in enumerate(images.records) if record.source == "drawn")
    file = tmp_path / "moved" / images.records[example].name
    assert images.image(example).size == (29, 31)
    Image.new("RGB", (29, 31)).save(file)
    with pytest.raises(CacheFormatError, match=r"must have sha256 \w+, got \w+; the source has"):
        images.image(example)
    file.unlink()
    gone = CachedImages(cache, [ImageSource(path=str(path)) for path in paths])
    with pytest.raises(CacheFormatError, match="got no such image; the source has changed"):
        gone.image(example)


def test_of_files_of_one_name_in_a_tar_the_bytes_tell_which_is_meant(
    cache: ActivationCache, tmp_path: Path
):
    drawn = sorted((tmp_path / "drawn").iterdir())
    Image.new("RGB", (5, 7)).save(tmp_path / "other.png")
    with tarfile.open(tmp_path / "drawn.tar", "w") as archive:
        for file in drawn:
            for one in (tmp_path / "other.png", file, tmp_path / "other.png"):
                archive.add(one, file.name)
    paths = (tmp_path / "drawn.tar", tmp_path / "more.npy")
    images = CachedImages(cache, [ImageSource(path=str(path)) for path in paths])
    everything = torch.arange(len(images.records))
    assert torch.equal(images.pixels(everything), CachedImages(cache).pixels(everything))
