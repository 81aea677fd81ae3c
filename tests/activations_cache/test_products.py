"""Linear layers in bfloat16 that multiply in float32."""

import copy

import pytest
import torch
from torch import nn

from activations_cache import loading
from activations_cache.loading import WideLinear, widen_products


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 64).bfloat16()


def layers(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.SiLU(), nn.Linear(64, 32, bias=False)).to(dtype)


@pytest.mark.usefixtures("without_bf16")
@pytest.mark.parametrize("n_rows", [1, loading._LEAST_ROWS, 200])
def test_a_wide_layer_gives_the_exact_product_rounded(n_rows: int) -> None:
    model = layer()
    widen_products(model)
    x = torch.randn(n_rows, 96).bfloat16()
    exact = x.double() @ model.weight.double().T + model.bias.double()
    assert isinstance(model, WideLinear)
    assert model(x).dtype == torch.bfloat16
    torch.testing.assert_close(model(x).double(), exact, rtol=2**-8, atol=2**-8)


@pytest.mark.usefixtures("without_bf16")
def test_many_rows_are_rounded_once() -> None:
    model = layer()
    x = torch.randn(3, 40, 96).bfloat16()
    widen_products(model)
    once = torch.addmm(model.bias.float(), x.flatten(0, 1).float(), model.weight.float().T)
    assert torch.equal(model(x).flatten(0, 1), once.bfloat16())


@pytest.mark.usefixtures("without_bf16")
def test_weights_keep_their_names_and_dtype_and_gradients_flow() -> None:
    model, before = layers(torch.bfloat16), layers(torch.bfloat16).state_dict()
    widen_products(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    x = torch.randn(40, 96).bfloat16().requires_grad_()
    copy.deepcopy(model)(x).float().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.usefixtures("without_bf16")
def test_float32_and_kinds_of_linear_layers_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(layers(torch.float32), Own(4, 4).bfloat16())
    widen_products(model)
    assert not any(isinstance(module, WideLinear) for module in model.modules())


def test_nothing_changes_where_the_processor_has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    model = layers(torch.bfloat16)
    widen_products(model)
    assert not any(isinstance(module, WideLinear) for module in model.modules())
