"""Models spread over devices, and with compiled blocks, give the rows that they should."""

import dataclasses
import functools

import pytest
import torch

from activations_cache import models
from activations_cache.hooks import capture
from activations_cache.models import load_model

HOOK = "model.layers.2:out"
IDS = torch.arange(3 * 17).view(3, 17)


def rows(loaded) -> torch.Tensor:
    with capture(loaded.model, [HOOK]) as run:
        return run(IDS.to(loaded.model.device))[HOOK]


def test_a_model_over_all_devices_gives_the_same_rows(monkeypatch, tiny_model, tiny_model_config):
    asked, read = [], models.read_model

    def reading(*arguments, **options):
        asked.append(options)
        return read(*arguments, **options)

    monkeypatch.setattr(models, "read_model", reading)
    spread = load_model(dataclasses.replace(tiny_model_config, devices="all"))
    assert asked == [{"device_map": "auto"}]  # accelerate's word for it
    assert torch.equal(rows(spread).cpu(), rows(tiny_model))
    assert spread.identity == tiny_model.identity


def test_compiled_blocks_give_the_rows_and_stop_at_the_hook(
    monkeypatch, tiny_model, tiny_model_config
):
    compiled = []

    def compile_eagerly(forward):
        compiled.append(forward)
        return eager(forward, backend="eager")

    eager = functools.partial(torch.compile)
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    loaded = load_model(dataclasses.replace(tiny_model_config, compile=True))
    assert len(compiled) == 5
    loaded.model.model.layers[3].forward = lambda *_, **__: pytest.fail("went beyond the hook")
    assert torch.allclose(rows(loaded), rows(tiny_model), atol=1e-5)
    assert loaded.identity == {**tiny_model.identity, "compiled": "blocks"}
