"""Capture gives what the model computes, stops early, and leaves no hook behind."""

import pytest
import torch
from torch import Tensor, nn

from activations_cache.hooks import capture, edit


def blocks(model: nn.Module) -> str:
    return "model.layers" if "Llama" in type(model).__name__ else "transformer.h"


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def tokens(n_examples: int, n_positions: int) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(1, 307, (n_examples, n_positions), generator=generator)


def test_captured_streams_equal_the_hidden_states_of_transformers(causal_model):
    x = tokens(3, 13)
    expected = causal_model(x, output_hidden_states=True).hidden_states
    path = blocks(causal_model)
    with capture(causal_model, [f"{path}.2:out", f"{path}.1:in", f"{path}.3:out"]) as run:
        result = run(x)
    assert list(result) == [f"{path}.2:out", f"{path}.1:in", f"{path}.3:out"]
    torch.testing.assert_close(result[f"{path}.2:out"], expected[3], rtol=0, atol=0)
    torch.testing.assert_close(result[f"{path}.1:in"], expected[1], rtol=0, atol=0)
    torch.testing.assert_close(result[f"{path}.3:out"], expected[4], rtol=0, atol=0)
    assert not torch.equal(expected[3], expected[4])


def test_capture_leaves_the_forward_after_the_last_hook_point(causal_model):
    reached = []
    path = blocks(causal_model)
    layers = dict(causal_model.named_modules())
    for i in range(5):
        layers[f"{path}.{i}"].register_forward_pre_hook(lambda *_, i=i: reached.append(i))
    with capture(causal_model, [f"{path}.2:out", f"{path}.1:out"]) as run:
        run(tokens(2, 7))
        assert reached == [0, 1, 2]
        run(tokens(2, 7))
        assert reached == [0, 1, 2, 0, 1, 2]
    reached.clear()
    with capture(causal_model, [f"{path}.2:in"]) as run:
        run(tokens(2, 7))
    assert reached == [0, 1, 2]


def test_without_stop_the_backbone_runs_to_its_end_but_not_the_head(causal_model):
    reached = []
    path = blocks(causal_model)
    modules = dict(causal_model.named_modules())
    modules[f"{path}.4"].register_forward_hook(lambda *_: reached.append("last block"))
    modules["lm_head"].register_forward_hook(lambda *_: reached.append("head"))
    with capture(causal_model, [f"{path}.0:out"], stop=False) as run:
        run(tokens(2, 7))
    assert reached == ["last block"]


def test_the_head_runs_where_a_hook_point_needs_it(causal_model):
    x = tokens(2, 7)
    with capture(causal_model, ["lm_head:out"]) as run:
        torch.testing.assert_close(run(x)["lm_head:out"], causal_model(x).logits)


def test_capture_reads_tensors_tuples_and_keyword_arguments(causal_model):
    """Attention gives a tuple and gets its input by keyword in Llama, by position in GPT-2."""
    x = tokens(2, 7)
    llama = blocks(causal_model) == "model.layers"
    norm, attention = ("input_layernorm", "self_attn") if llama else ("ln_1", "attn")
    path = f"{blocks(causal_model)}.1"
    points = [f"{path}.{norm}:out", f"{path}.{attention}:in", f"{path}.{attention}:out"]
    with capture(causal_model, points) as run:
        result = run(x)
    torch.testing.assert_close(result[points[0]], result[points[1]], rtol=0, atol=0)
    assert result[points[2]].shape == (2, 7, 23)


def test_captured_streams_do_not_change_when_a_later_module_works_in_place():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    with capture(model, ["0:out"], stop=False) as run:
        result = run(x)["0:out"]
    torch.testing.assert_close(result, model[0](x).detach())
    assert (result < 0).any()
    assert not result.requires_grad


def test_capture_reads_a_vision_model(vit_model):
    pixels = torch.randn(2, 3, 21, 21, generator=torch.Generator().manual_seed(0))
    block = next(name for name, m in vit_model.named_modules() if type(m).__name__ == "ViTLayer")
    block = f"{block.removesuffix('.0')}.1"
    expected = vit_model(pixels, output_hidden_states=True).hidden_states[2]
    with capture(vit_model, [f"{block}:out"]) as run:
        torch.testing.assert_close(run(pixels)[f"{block}:out"], expected, rtol=0, atol=0)


def test_an_attention_mask_reaches_the_model(causal_model):
    x = tokens(2, 7)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    point = f"{blocks(causal_model)}.2:out"
    with capture(causal_model, [point]) as run:
        plain, masked = run(x)[point], run(x, attention_mask=mask)[point]
    assert torch.allclose(plain[1], masked[1], atol=1e-6)
    assert not torch.allclose(plain[0, 3:], masked[0, 3:], atol=1e-3)


def test_unknown_modules_are_refused_with_the_nearest_names(causal_model):
    path = blocks(causal_model)
    for make in (
        lambda: capture(causal_model, [f"{path}.1:out", f"{path}.5.mlp:out"]),
        lambda: edit(causal_model, {f"{path}.1:out": torch.add, f"{path}.5.mlp:out": torch.add}),
    ):
        with (
            pytest.raises(
                ValueError,
                match=r"must name a module .*5 blocks is [a-z.]+\.2:out; .*nearest are .*\.mlp",
            ),
            make(),
        ):
            pass
        assert n_hooks(causal_model) == 0


def test_a_hook_point_that_is_not_passed_is_named(causal_model):
    causal_model.unused = nn.Linear(2, 2)
    with (
        capture(causal_model, ["unused:out"]) as run,
        pytest.raises(ValueError, match=r"must be passed by the forward, got no \['unused:out'\]"),
    ):
        run(tokens(2, 7))


def test_a_hook_point_that_is_passed_twice_is_refused():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, shared, nn.Linear(3, 2))
    with (
        capture(model, ["0:out", "2:out"]) as run,
        pytest.raises(ValueError, match="0:out must be passed once"),
    ):
        run(torch.zeros(2, 7, 3))
    assert n_hooks(model) == 0


def test_what_is_no_stream_is_refused(causal_model):
    base = "model" if blocks(causal_model) == "model.layers" else "transformer"
    embedding = "model.embed_tokens" if base == "model" else "transformer.wte"
    with (
        capture(causal_model, [f"{embedding}:in"]) as run,
        pytest.raises(ValueError, match=r"must carry a stream of shape .*, got \(2, 7\)"),
    ):
        run(tokens(2, 7))
    with (
        capture(causal_model, [f"{base}:out"]) as run,
        pytest.raises(ValueError, match=r"must carry a stream .*, got BaseModelOutput"),
    ):
        run(tokens(2, 7))


def test_other_calls_inside_a_capture_are_left_alone(causal_model):
    x = tokens(2, 7)
    expected = causal_model(x).logits
    with capture(causal_model, [f"{blocks(causal_model)}.1:out"]):
        torch.testing.assert_close(causal_model(x).logits, expected, rtol=0, atol=0)


def test_capture_removes_its_hooks(causal_model):
    with capture(causal_model, [f"{blocks(causal_model)}.1:out"]) as run:
        run(tokens(2, 7))
        assert n_hooks(causal_model) == 1
    assert n_hooks(causal_model) == 0
    with (
        pytest.raises(RuntimeError, match="stop here"),
        capture(causal_model, [f"{blocks(causal_model)}.1:out"]),
    ):
        raise RuntimeError("stop here")
    assert n_hooks(causal_model) == 0


@pytest.mark.real
def test_block_15_of_smollm2_equals_its_hidden_state(smollm2):
    text = "It is a truth universally acknowledged, that a single man in possession"
    x = smollm2.tokenizer(text, return_tensors="pt").input_ids
    expected = smollm2.model(x, output_hidden_states=True).hidden_states[16]
    with capture(smollm2.model, ["model.layers.15:out"]) as run:
        result = run(x)["model.layers.15:out"]
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected)
