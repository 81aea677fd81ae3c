"""Models that are wrapped, stored or compiled otherwise than transformers gives them, and ViTs.

Rows of the tables of docs/models.md beside those of `tests/families.py`.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

from activations_cache.config import ModelConfig
from activations_cache.hooks import blocks_of, capture, edit
from activations_cache.probe import layout_of
from activations_cache.vision import LoadedVisionModel, load_vision_model
from sae.steer.edits import Push
from sae.steer.generation import Patches
from sae.steer.steering import Steering
from tests.families import make, parts_of


class EightBits(nn.Module):
    """A linear layer whose weight is stored in 8 bits, as quantisers make them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().char(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


class Inner(nn.Module):
    """What PEFT puts around a model, with the same names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


class Outer(nn.Module):
    """What PEFT shows: its `generate` calls the inner model's and never its own forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = Inner(model)

    def forward(self, input_ids: Tensor | None = None, **kwargs: object) -> object:
        return self.base_model(input_ids=input_ids, **kwargs)

    def generate(self, *args: object, **kwargs: object) -> object:
        return self.base_model.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


def _in_peft() -> nn.Module:
    model = make("Llama")
    if importlib.util.find_spec("peft") is None:
        return Outer(model).eval()
    peft = importlib.import_module("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, settings).eval().requires_grad_(False)


def in_eight_bits(model: nn.Module) -> nn.Module:
    """The same with every linear layer in 8 bits, the head too."""
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    for name, module in linear.items():
        model.set_submodule(name, EightBits(module))
    return model


def _blocks_compiled() -> nn.Module:
    """As `model.compile: true` does."""
    model = make("Llama")
    for block in blocks_of(model)[1]:
        block.forward = torch.compile(block.forward, backend="eager")
    return model


def _compiled() -> nn.Module:
    model = make("Llama")
    model.compile(backend="eager")
    return model


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "Llama in PEFT": _in_peft,
    "Llama in 8 bits": lambda: in_eight_bits(make("Llama")),
    "Llama, blocks compiled": _blocks_compiled,
    "Llama, compiled": _compiled,
}

SHORT_VARIANTS = ("Llama in PEFT", "Llama in 8 bits")
"""Those of the short form."""

WIDE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "image_size": 28,
        "patch_size": 7}  # fmt: skip
VISION = {**WIDE, "intermediate_size": 29}

TOWERS: dict[str, tuple[str, str, dict]] = {
    "ViT": ("ViTModel", "ViTConfig", VISION),
    "DINOv2": ("Dinov2Model", "Dinov2Config", WIDE),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig",
                              {**WIDE, "num_register_tokens": 3}),
    "DINOv3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**VISION, "num_register_tokens": 2}),
    "CLIP": ("CLIPVisionModel", "CLIPVisionConfig", VISION),
    "SigLIP": ("SiglipVisionModel", "SiglipVisionConfig", VISION),
}  # fmt: skip
"""By name: the class, its configuration, and a toy's settings."""


SHORT_TOWERS = ("DINOv2 with registers", "SigLIP")
"""Those of the short form."""


class TowerRow(NamedTuple):
    """What holds for a ViT; each word was checked against the model's own outputs."""

    family: str
    blocks: str
    positions: str
    verify: str
    steering: str
    parts: str


def tower(family: str) -> LoadedVisionModel:
    """A toy whose weights are large enough that its parts matter, loaded as a cache loads it."""
    model_class, config, settings = TOWERS[family]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config)(**settings))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return load_vision_model(ModelConfig(path=directory, dtype="float32"))


def tower_row_of(family: str) -> TowerRow:
    """Try a tower, and compare everything that is said of it with the model itself."""
    loaded = tower(family)
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(7))
    blocks, _ = blocks_of(loaded.model)
    return TowerRow(
        family,
        f"`{blocks}`",
        _positions(loaded, blocks, pixels),
        _verify(loaded, blocks, pixels),
        _steering(loaded, blocks, pixels),
        parts_of(loaded.model, blocks, pixels, is_sum=True),
    )


def _positions(loaded: LoadedVisionModel, blocks: str, pixels: Tensor) -> str:
    """Changing a patch of the image changes the stream at that patch's position first."""
    n_prefix, point = loaded.reading.n_prefix, f"{blocks}.0:in"
    other = pixels.clone()
    other[:, :, 14:21, 7:14] += 3  # the patch in row 2, column 1
    with capture(loaded.model, [point]) as run:
        before, after = run(pixels)[point], run(other)[point]
    assert before.shape == (3, loaded.reading.n_positions(28), 24)
    assert (after - before).abs().amax(dim=(0, 2)).nonzero().tolist() == [[n_prefix + 2 * 4 + 1]]
    n_registers = n_prefix - loaded.reading.has_class_token
    parts = ["class token"] * loaded.reading.has_class_token
    return ", ".join([*parts, *[f"{n_registers} registers"] * bool(n_registers), "patches"])


def _verify(loaded: LoadedVisionModel, blocks: str, pixels: Tensor) -> str:
    layout = layout_of(loaded.model)
    points = [f"{blocks}.{i}:out" for i in range(len(layout.hidden_states))]
    entry = loaded.model.get_submodule(layout.reader)
    hidden = entry(pixels, output_hidden_states=True).hidden_states
    with capture(loaded.model, points) as run:
        seen = run(pixels)
    n_equal = 0
    for point, number in zip(points, layout.hidden_states, strict=True):
        if number is not None:
            assert torch.allclose(seen[point], hidden[number], atol=1e-5, rtol=1e-5)
            n_equal += 1
    return "by `hidden_states`" if n_equal >= len(points) - 1 else "by a whole forward"


def _steering(loaded: LoadedVisionModel, blocks: str, pixels: Tensor) -> str:
    """Class token and patches are told apart: only the rows that are meant change."""
    model, n_prefix, point = loaded.model, loaded.reading.n_prefix, f"{blocks}.1:out"
    vector = torch.randn(24, generator=torch.Generator().manual_seed(0))
    after: list[Tensor] = []
    changed = {Patches(n_prefix=n_prefix): set(range(n_prefix, n_prefix + 16))}
    changed |= {"class": {0}} if loaded.reading.has_class_token else {}
    with capture(model, [point]) as run:
        before = run(pixels)[point]
    for policy, expected in changed.items():
        with (
            Steering(model, [Push(point, vector)], positions=policy, first_position=0) as steering,
            edit(model, {point: lambda stream, _: after.append(stream.clone()) or stream}),
        ):
            model(pixels)
        moved = (after[-1] - before).abs().amax(dim=(0, 2)).nonzero().flatten().tolist()
        assert set(moved) == expected
        assert steering.n_tokens == 3 * len(expected)
    return "patches, class token" if loaded.reading.has_class_token else "patches"


def tower_table() -> str:
    """The table of towers as Markdown."""
    names = ("family", "blocks", "positions", "verify", "steering", "parts that are added")
    lines = [names, ("---",) * len(names), *(tower_row_of(family) for family in TOWERS)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
