"""Pixels are those of transformers' own processors; settings are read from a model's files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from activations_cache.config import ImagePreprocessing
from activations_cache.loading import ModelError
from activations_cache.preprocessing import Preprocessing, as_rgb, read_settings, resolve

PLAIN = Preprocessing(
    size=7,
    shortest_edge=None,
    interpolation="bilinear",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    background=(255, 255, 255),
)
NOTHING = ImagePreprocessing()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 53, "width": 53}),
        ViTImageProcessorPil(size={"height": 31, "width": 31}, resample=3, do_normalize=False),
        BitImageProcessorPil(
            size={"shortest_edge": 61}, crop_size={"height": 53, "width": 53}, image_mean=[0.4] * 3
        ),
        CLIPImageProcessorPil(size={"shortest_edge": 47}, crop_size={"height": 47, "width": 47}),
        SiglipImageProcessorPil(size={"height": 43, "width": 43}),
        SiglipImageProcessorPil(size={"height": 43, "width": 43}, rescale_factor=1 / 127),
        ViTImageProcessorPil(size={"height": 43, "width": 43}, do_rescale=False),
    ],
)
def test_pixels_are_those_of_transformers(processor, tmp_path: Path):
    processor.save_pretrained(tmp_path)
    preprocessing = resolve(NOTHING, read_settings(tmp_path))
    for width, height in ((97, 71), (71, 97), (59, 59), (23, 37)):
        image = picture(width, height)
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(preprocessing(image), expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_settings_of_transformers_are_found_in_either_file(name: str, tmp_path: Path):
    entries = json.loads(ViTImageProcessorPil(size={"height": 31, "width": 31}).to_json_string())
    wrapped = {"image_processor": entries} if name == "processor_config.json" else entries
    (tmp_path / name).write_text(json.dumps(wrapped))
    assert read_settings(tmp_path) == ImagePreprocessing(
        size=31, crop=False, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    )


def test_old_settings_give_the_size_as_a_number(tmp_path: Path):
    file = tmp_path / "preprocessor_config.json"
    file.write_text('{"size": 31, "image_mean": [0.5, 0.4, 0.3], "image_std": [1, 1, 1]}')
    assert read_settings(tmp_path).shortest_edge is None
    assert read_settings(tmp_path).size == 31
    file.write_text(
        '{"size": 37, "crop_size": 31, "do_center_crop": true, "image_mean": [0.5, 0.4, 0.3], '
        '"image_std": [1, 1, 1]}'
    )
    result = read_settings(tmp_path)
    assert (result.size, result.shortest_edge, result.mean) == (31, 37, (0.5, 0.4, 0.3))


def test_settings_of_timm_and_open_clip(tmp_path: Path):
    timm = {"input_size": [3, 31, 31], "crop_pct": 0.9, "interpolation": "bicubic"}
    timm |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": timm}))
    assert read_settings(tmp_path) == ImagePreprocessing(
        size=31,
        crop=True,
        shortest_edge=34,  # 31 / 0.9, rounded down
        interpolation="bicubic",
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.1),
    )
    clip = {"preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}}
    clip["preprocess_cfg"]["resize_mode"] = "squash"
    clip["model_cfg"] = {"vision_cfg": {"image_size": 37}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(clip))
    result = read_settings(tmp_path)
    assert (result.size, result.crop, result.interpolation) == (37, False, "bicubic")


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"size": {"height": 31, "width": 37}}, "size must be a square"),
        ({"size": 31, "image_mean": [0.5]}, "ValueError: not enough values"),
        ({"image_mean": [0.5]}, "KeyError: 'size'"),
        ({"size": 31, "resample": 77}, "77 is not a valid Resampling"),
    ],
)
def test_settings_that_cannot_be_followed_cost_one_line(tmp_path: Path, entries, reason: str):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(entries))
    with pytest.raises(ModelError, match=f"must hold settings for images .*{reason}") as error:
        read_settings(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_asked_for_goes_before_what_the_model_says():
    result = ImagePreprocessing(
        size=20, crop=True, shortest_edge=25, mean=(0.1, 0.1, 0.1), std=(0.5, 0.5, 0.5)
    )
    assert resolve(NOTHING, result).shortest_edge == 25
    assert resolve(ImagePreprocessing(size=40), result).shortest_edge == 50
    assert resolve(ImagePreprocessing(crop=False), result).shortest_edge is None
    assert resolve(ImagePreprocessing(shortest_edge=31), result).shortest_edge == 31
    custom = ImagePreprocessing(mean=(0.2, 0.3, 0.4), interpolation="box")
    assert resolve(custom, result).mean == (0.2, 0.3, 0.4)
    assert resolve(custom, result).interpolation == "box"
    with pytest.raises(ValueError, match="shortest_edge must be at least the size 20, got 19"):
        resolve(ImagePreprocessing(shortest_edge=19), result)


def test_without_settings_nothing_is_guessed(tmp_path: Path):
    assert read_settings(tmp_path) == NOTHING
    for given, missing in (({}, "size"), ({"size": 7}, "mean"), ({"mean": (0.5,) * 3}, "size")):
        with pytest.raises(ValueError, match=f"preprocessing.{missing} must be given where"):
            resolve(ImagePreprocessing(**given), NOTHING)


def test_transparency_shows_the_background():
    image = Image.new("RGBA", (5, 5), (10, 20, 30, 0))
    image.putpixel((2, 2), (10, 20, 30, 255))
    result = np.asarray(as_rgb(image, (255, 128, 64)))
    assert result[2, 2].tolist() == [10, 20, 30]
    assert result[0, 0].tolist() == [255, 128, 64]
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert np.asarray(as_rgb(palette, (255, 128, 64)))[0, 0].tolist() == [255, 128, 64]


def test_grey_and_16_bit_images_keep_their_tones():
    grey = Image.fromarray(np.full((5, 5), 51, np.uint8))
    np.testing.assert_allclose(PLAIN(grey), 0.2, atol=1e-6)
    deep = Image.fromarray(np.full((5, 5), 51 * 257, np.uint16))
    assert deep.mode.startswith("I;16")
    np.testing.assert_allclose(PLAIN(deep), 0.2, atol=1e-6)
    with pytest.raises(ValueError, match="colour mode must be an 8-bit or 16-bit one, got F"):
        PLAIN(Image.fromarray(np.zeros((5, 5), np.float32)))


def test_a_line_is_no_image():
    assert PLAIN(Image.new("RGB", (300, 3))).shape == (3, 7, 7)
    with pytest.raises(ValueError, match=r"no side may be over 100 times as long .*, got 2 x 201"):
        PLAIN(Image.new("RGB", (2, 201)))


def test_the_middle_is_cut_out():
    image = Image.new("RGB", (21, 7))
    image.paste((255, 255, 255), (7, 0, 14, 7))
    crop = Preprocessing(**{**vars(PLAIN), "shortest_edge": 7})
    np.testing.assert_array_equal(crop(image), 1)
    assert PLAIN(image).mean() == pytest.approx(1 / 3, abs=0.02)
