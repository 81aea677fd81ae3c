"""Several processes build one cache of images; the bytes do not tell how many there were."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from activations_cache import io
from activations_cache.builder import build
from activations_cache.config import (
    CacheConfig,
    ImagePreprocessing,
    ImagesConfig,
    ImageSource,
    ModelConfig,
)
from activations_cache.images import read_images, read_skipped
from tests.activations_cache.ranks import build_in_ranks

SIZE, PATCH, N_PATCHES, N_IMAGES, N_RANKS = 21, 7, 9, 29, 3


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of several processes; what is synced when is tested elsewhere."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(io, "fsync", lambda descriptor: None)


@pytest.fixture
def config(tmp_path: Path) -> CacheConfig:
    """Two images in a shard; one of all cannot be read."""
    torch.manual_seed(7)
    small = ViTConfig(
        hidden_size=22, num_hidden_layers=2, num_attention_heads=11, intermediate_size=29,
        image_size=SIZE, patch_size=PATCH,
    )  # fmt: skip
    ViTModel(small, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    made = np.random.default_rng(5)
    for number in range(N_IMAGES):
        file = tmp_path / "photos" / ("bird", "cat")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(made.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(file)
    (tmp_path / "photos" / "cat" / "broken.png").write_bytes(b"no picture")
    preprocessing = ImagePreprocessing(size=SIZE, crop=False, mean=(0.5,) * 3, std=(0.5,) * 3)
    sources = (ImageSource(path=str(tmp_path / "photos")),)
    return CacheConfig(
        model=ModelConfig(path=str(tmp_path / "model"), dtype="float32"),
        images=ImagesConfig(sources=sources, preprocessing=preprocessing),
        hook_points=("layers.0:out",),
        n_rows=N_PATCHES * 23,
        dtype="float32",
        rows_per_shard=N_PATCHES * 2 + 1,
        contexts_per_forward=5,
    )


def content(path: Path) -> Iterator[tuple[str, bytes]]:
    varying = ("journal", "manifest.json", ".locks")
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.is_file() and not name.startswith(varying):
            yield name, file.read_bytes()


def test_three_processes_build_what_one_does(config: CacheConfig, tmp_path: Path):
    alone = build(config, tmp_path / "alone")
    assert build_in_ranks(N_RANKS, config, tmp_path / "shared") == [0] * N_RANKS
    shared = build(config, tmp_path / "shared")
    assert dict(content(shared.path)) == dict(content(alone.path))
    assert shared.fingerprint == alone.fingerprint
    assert read_images(shared) == read_images(alone)
    [skipped] = read_skipped(shared)
    assert skipped.name == "cat/broken.png"
    assert skipped.reason == "UnidentifiedImageError: cannot identify image file"
    journals = list(shared.path.glob("journal.rank*.jsonl"))
    assert len(journals) == N_RANKS
    written = sum(journal.read_bytes().count(b"\n") for journal in journals)
    assert written == alone.manifest.plan.n_shards > N_RANKS
