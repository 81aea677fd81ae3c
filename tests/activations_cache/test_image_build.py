"""A cache of images: the tower's own numbers, patch by patch, with classes and provenance."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import activations_cache
from activations_cache import builder, io
from activations_cache.builder import build
from activations_cache.checks import CacheFormatError, silent
from activations_cache.config import (
    CacheConfig,
    ImagePreprocessing,
    ImagesConfig,
    ImageSource,
    ModelConfig,
)
from activations_cache.hooks import hook_points_of
from activations_cache.images import IMAGE_TABLE, read_images, read_skipped
from activations_cache.live import ActivationStream, stream, stream_beside
from activations_cache.reader import ActivationCache

SIZE, PATCH, D_MODEL, N_PATCHES = 21, 7, 22, 9
WIDE = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": 3,
    "num_attention_heads": 11,
    "image_size": SIZE,
    "patch_size": PATCH,
}
PROCESSOR = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of several processes; what is synced when is tested elsewhere."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(io, "fsync", lambda descriptor: None)


def paint(root: Path) -> Path:
    """23 images in 3 classes, one of them cut short."""
    for i in range(23):
        file = root / ("bird", "cat", "dog")[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(i).integers(0, 256, (29 + i, 31, 3), np.uint8)
        Image.fromarray(values).save(file)
    cut = root / "cat" / "7.png"
    cut.write_bytes(cut.read_bytes()[:-500])
    return root


def save_model(model: torch.nn.Module, directory: Path) -> Path:
    model.save_pretrained(directory)
    PROCESSOR.save_pretrained(directory)
    return directory


def vit() -> transformers.ViTModel:
    torch.manual_seed(7)
    return transformers.ViTModel(
        transformers.ViTConfig(**WIDE, intermediate_size=29), add_pooling_layer=False
    ).eval()


def with_registers() -> transformers.Dinov2WithRegistersModel:
    torch.manual_seed(7)
    return transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**WIDE, num_register_tokens=3)
    ).eval()


def siglip() -> transformers.SiglipVisionModel:
    torch.manual_seed(7)
    return transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**WIDE, intermediate_size=29)
    ).eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> CacheConfig:
    """Nearly all images; 2 of them in a shard."""
    model = save_model(vit(), tmp_path_factory.mktemp("model"))
    return CacheConfig(
        model=ModelConfig(path=str(model), dtype="float32"),
        images=ImagesConfig(sources=(ImageSource(path=str(photos)),), seed=6),
        hook_points=("layers.1:out", "layers.2:in"),
        n_rows=N_PATCHES * 17,
        dtype="float32",
        rows_per_shard=N_PATCHES * 2 + 1,
        contexts_per_forward=5,
    )


@pytest.fixture(scope="module")
def cache(config: CacheConfig, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return build(config, tmp_path_factory.mktemp("build") / "cache")


def other(config: CacheConfig, model: torch.nn.Module, path: Path, **changes: object):
    """The configuration with another model, and changes to the images."""
    directory = save_model(model, path / "model")
    return replace(
        config,
        model=ModelConfig(path=str(directory), dtype="float32"),
        images=replace(config.images, **changes),
        hook_points=(hook_points_of(model)[9],),
        rows_per_shard=43,
    )


def expected_stream(model: torch.nn.Module, photos: Path, names: list[str]) -> torch.Tensor:
    """The stream after block 1, by transformers alone."""
    images = [Image.open(photos / name).convert("RGB") for name in names]
    given = PROCESSOR(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(given, output_hidden_states=True).hidden_states[2]


def content(path: Path) -> dict[str, bytes]:
    own = ("journal", "manifest.json", ".locks")
    files = (p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file())
    return {str(f): (path / f).read_bytes() for f in files if not str(f).startswith(own)}


def test_rows_are_the_patches_of_the_tower(cache: ActivationCache, photos: Path):
    names = [record.name for record in read_images(cache)]
    hidden = expected_stream(vit(), photos, names)
    refs = cache.refs(cache.rows())
    for name in cache.hook_points:
        found = cache[name][cache.rows()]
        assert torch.allclose(found, hidden[refs.example, refs.position], atol=1e-5)
    assert (refs.position == refs.token + 1).all()  # position 0 is the class token
    assert sorted(set(refs.token.tolist())) == list(range(N_PATCHES))
    assert cache.n_rows == len(names) * N_PATCHES
    assert cache.verify() == []


def test_classes_splits_and_hashes_are_carried_along(cache: ActivationCache):
    records = read_images(cache)
    assert cache.label_names == ("bird", "cat", "dog")
    assert cache.examples.source_names == ("photos",)
    refs = cache.refs(cache.rows())
    labels = cache.token_labels(cache.rows()).tolist()
    for example, label in zip(refs.example.tolist(), labels, strict=True):
        record = records[example]
        assert cache.label_names[label] == record.label == record.name.split("/")[0]
    splits = [activations_cache.config.SPLITS[s] for s in cache.examples.split.tolist()]
    assert splits == [record.split for record in records]
    assert len(cache.rows(("explain", "score"))) == N_PATCHES * 17
    assert set(splits) == {"explain", "score", "hold"}


def test_the_unreadable_image_is_left_out_and_listed(cache: ActivationCache):
    assert "cat/7.png" not in {record.name for record in read_images(cache)}
    [skipped] = read_skipped(cache)
    assert (skipped.source, skipped.name) == ("photos", "cat/7.png")
    assert cache.manifest.provenance["images"]["n_skipped"] == 1
    assert cache.manifest.provenance["images"]["n_images"] == len(read_images(cache))


def test_the_identity_says_how_images_became_rows(cache: ActivationCache, photos: Path):
    images = cache.identity["images"]
    assert images["tokens"] == "patches"
    assert (images["grid"], images["n_prefix"], images["seed"]) == ([3, 3], 1, 6)
    assert images["preprocessing"] == {
        "size": SIZE,
        "shortest_edge": None,
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "background": [255, 255, 255],
    }
    assert (cache.identity["context"], cache.identity["skip_positions"]) == (10, 1)
    assert cache.identity["model"]["model"] == "ViTModel"
    assert str(photos) not in json.dumps(cache.identity)


def test_another_place_and_a_stop_in_between_give_the_same_bytes(
    cache: ActivationCache, config: CacheConfig, tmp_path: Path
):
    class Stop(Exception):
        pass

    def stop(done: int, total: int, unit: str) -> None:
        if unit == "rows" and done > 60:
            raise Stop

    with pytest.raises(Stop):
        build(config, tmp_path / "cache", progress=stop)
    with pytest.raises(CacheFormatError, match="must be finished"):
        activations_cache.open(tmp_path / "cache")
    build(config, tmp_path / "cache")
    assert content(tmp_path / "cache") == content(cache.path)


def test_a_complete_cache_is_opened_without_the_model(
    cache: ActivationCache, config: CacheConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(builder, "load_on_device")
    assert build(config, cache.path).fingerprint == cache.fingerprint
    another = replace(config, images=replace(config.images, tokens="all"))
    with pytest.raises(CacheFormatError, match=r"config\.images\.tokens: expected 'all', got 'pat"):
        build(another, cache.path)


def test_new_images_are_noticed(config: CacheConfig, tmp_path: Path):
    photos = paint(tmp_path / "photos")
    images = replace(config.images, sources=(ImageSource(path=str(photos)),))
    few = replace(config, images=images, n_rows=N_PATCHES)
    build(few, tmp_path / "cache")
    build(few, tmp_path / "cache")
    Image.new("RGB", (5, 5)).save(photos / "cat" / "new.png")
    with pytest.raises(CacheFormatError, match=r"another files\..*photos: expected \["):
        build(few, tmp_path / "cache")


@pytest.mark.parametrize(
    ("make", "tokens", "positions", "ids"),
    [
        (with_registers, "patches", range(4, 13), range(9)),
        (with_registers, "all", range(13), [*range(9, 13), *range(9)]),
        (with_registers, "cls", [0], [9]),
        (siglip, "patches", range(9), range(9)),
        (siglip, "all", range(9), range(9)),
    ],
)
def test_which_positions_give_rows_is_a_choice(
    config: CacheConfig,
    photos: Path,
    tmp_path: Path,
    make: Callable[[], torch.nn.Module],
    tokens: str,
    positions: list[int],
    ids: list[int],
):
    model = make()
    few = replace(other(config, model, tmp_path, tokens=tokens), n_rows=2)
    found = build(few, tmp_path / "cache")
    refs = found.refs(found.rows())
    first = refs.example == 0
    assert refs.position[first].tolist() == list(positions)
    assert refs.token[first].tolist() == list(ids)
    hidden = expected_stream(model, photos, [record.name for record in read_images(found)])
    rows = found[found.hook_points[0]][found.rows()]
    assert torch.allclose(rows, hidden[refs.example, refs.position], atol=1e-5)
    assert found.verify() == []


def test_a_model_without_a_class_token_has_none_to_keep(config: CacheConfig, tmp_path: Path):
    asked = other(config, siglip(), tmp_path, tokens="cls")
    with pytest.raises(ValueError, match=r"images\.tokens must be patches or all for a model with"):
        build(asked, tmp_path / "cache")


def test_another_size_has_more_patches(config: CacheConfig, tmp_path: Path):
    larger = ImagePreprocessing(size=SIZE + PATCH)
    asked = replace(other(config, vit(), tmp_path, preprocessing=larger), n_rows=17)
    found = build(asked, tmp_path / "cache")
    assert found.identity["images"]["grid"] == [4, 4]
    assert found.n_rows == 16 * len(read_images(found))


def test_a_hook_point_off_the_stream_is_refused(config: CacheConfig, tmp_path: Path):
    asked = replace(other(config, siglip(), tmp_path), hook_points=("head.attention:out",))
    with pytest.raises(
        ValueError, match=r"must carry the 9 positions .*, got 1 at head\.attention"
    ):
        build(asked, tmp_path / "cache")


def test_the_stream_without_a_disk_gives_the_same_rows(cache: ActivationCache, config: CacheConfig):
    live = stream(config)
    assert torch.equal(live.rows(), cache.rows())
    batch = next(live.batches(batch=31, seed=5))
    expected = torch.cat([cache[name][batch.rows] for name in cache.hook_points], dim=1)
    assert torch.equal(batch.x, expected)


def test_images_to_train_on_beside_a_cache_are_none_of_it(config: CacheConfig, tmp_path: Path):
    small = build(replace(config, n_rows=N_PATCHES * 5), tmp_path / "cache")
    source = stream_beside(small, config, None, silent)
    known = {record.sha256 for record in read_images(small)}
    names = [record.sha256 for record in source.records]
    assert len(names) == 17 - 5 == len(source.examples) == source.plan.n_examples
    assert not known & {*names}
    whole, n = build(config, tmp_path / "whole"), config.contexts_per_forward
    places = [[r.sha256 for r in read_images(whole)].index(name) for name in names]
    rows = next(ActivationStream(source, n, buffer_rows=999).batches(batch=99, seed=5))
    refs = whole.refs(whole.rows())
    for row, x in zip(rows.rows.tolist(), rows.x, strict=True):
        shard, offset = divmod(row, source.plan.rows_per_shard)
        number, position = divmod(offset, N_PATCHES)
        here = (refs.example == places[2 * shard + number]).nonzero()[position, 0]
        expected = [whole[name][whole.rows()[here : here + 1]] for name in whole.hook_points]
        assert torch.allclose(x, torch.cat(expected, dim=1)[0], rtol=1e-4, atol=1e-5)


def test_a_damaged_table_is_refused_and_written_again(config: CacheConfig, tmp_path: Path):
    few = replace(config, n_rows=N_PATCHES)
    found = build(few, tmp_path / "cache")
    whole = (found.path / IMAGE_TABLE).read_bytes()
    (found.path / IMAGE_TABLE).write_bytes(whole.replace(b"cat", b"dog").replace(b"bird", b"dogs"))
    with pytest.raises(CacheFormatError, match=r"images.jsonl must have sha256 .*, got "):
        read_images(found)
    (found.path / "manifest.json").unlink()
    again = build(few, tmp_path / "cache")
    assert (again.path / IMAGE_TABLE).read_bytes() == whole
