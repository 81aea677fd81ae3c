"""Configurations of images refuse what cannot work, field name first."""

import subprocess
import sys

import pytest

from activations_cache.config import (
    CacheConfig,
    ImagePreprocessing,
    ImagesConfig,
    ImageSource,
    ModelConfig,
    TextConfig,
    TextSource,
)

SOURCE = ImageSource(path="photos")
IMAGES = ImagesConfig(sources=(SOURCE,))
TEXT = TextConfig(sources=(TextSource(path="a.txt"),), context=31)


def cache_config(**changes: object) -> CacheConfig:
    fields = {
        "model": ModelConfig(path="package://carrier/dino.onnx"),
        "images": IMAGES,
        "hook_points": ("encoder.layer.8:out",),
        "n_rows": 7,
    }
    return CacheConfig(**{**fields, **changes})


def test_config_imports_neither_torch_nor_numpy():
    code = (
        "import sys, activations_cache.config;"
        "assert not {'torch', 'numpy', 'transformers', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "path must not be empty"),
        ({"path": "package://x"}, "path must have the form package://PACKAGE/inner/path"),
        ({"field": ""}, "field must not be empty"),
        ({"label": ""}, "label must not be empty"),
        ({"path": "a.npy", "label": "kind"}, "label must be the path of a .npy file where path"),
    ],
)
def test_image_source_refuses(changes: dict, message: str):
    with pytest.raises(ValueError, match=r".+ must .+") as error:
        ImageSource(**{"path": "photos", **changes})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"shortest_edge": 0}, "shortest_edge must be at least 1, got 0"),
        ({"crop": False, "shortest_edge": 7}, "shortest_edge must be absent where crop is false"),
        ({"size": 11, "shortest_edge": 7}, "shortest_edge must be at least 11, got 7"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be a positive number, got 0.0"),
        ({"background": (0, 256, 0)}, "background must have parts from 0 to 255"),
    ],
)
def test_preprocessing_refuses(changes: dict, message: str):
    with pytest.raises(ValueError, match=r".+ must .+") as error:
        ImagePreprocessing(**changes)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "sources must name at least one source"),
        ({"sources": (SOURCE, SOURCE)}, "sources must differ from each other"),
        ({"explain": 0.5}, "explain must sum to 1 together with score and hold"),
        ({"score": -0.1}, "score must be at least 0, got -0.1"),
        ({"explain": 0.0, "score": 0.0, "hold": 1.0}, "hold must leave images to explain"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_images_config_refuses(changes: dict, message: str):
    with pytest.raises(ValueError, match=r".+ must .+") as error:
        ImagesConfig(**{"sources": (SOURCE,), **changes})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "text must be given, or images in its place, got 'neither'"),
        ({"text": TEXT}, "text must be given, or images in its place, got 'text and images'"),
        ({"skip_positions": 2}, "skip_positions must be left out with images"),
        ({"rows_per_shard": 0}, "rows_per_shard must be at least 1, got 0"),
    ],
)
def test_cache_config_refuses(changes: dict, message: str):
    with pytest.raises(ValueError, match=r".+ must .+") as error:
        cache_config(**changes)
    assert str(error.value).startswith(message)


def test_data_is_what_the_model_reads():
    assert cache_config().data is IMAGES
    assert cache_config(images=None, text=TEXT).data is TEXT
