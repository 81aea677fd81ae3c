"""Edits act where the stream flows on, at the right positions, with and without a KV cache."""

import copy

import pytest
import torch
from torch import Tensor, nn

from activations_cache.hooks import capture, edit
from activations_cache.reading import given_cache


def blocks(model: nn.Module) -> str:
    return "model.layers" if "Llama" in type(model).__name__ else "transformer.h"


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def tokens(n_examples: int, n_positions: int) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(1, 307, (n_examples, n_positions), generator=generator)


class Recorder:
    """An edit that shifts the stream by the position and remembers the positions it was given."""

    def __init__(self, size: float = 0.1):
        self.size = size
        self.positions: list[Tensor] = []

    def __call__(self, h: Tensor, positions: Tensor) -> Tensor:
        self.positions.append(positions.clone())
        direction = torch.linspace(-1, 1, h.shape[-1])
        return h + self.size * (positions[..., None] % 5) * direction


def test_an_edit_acts_where_the_stream_flows_on(causal_model):
    """h' = 2 h at the output of block 1 is what block 2 reads."""
    x, path = tokens(2, 7), blocks(causal_model)
    with capture(causal_model, [f"{path}.1:out"]) as run:
        before = run(x)[f"{path}.1:out"]
    for point in (f"{path}.1:out", f"{path}.2:in"):
        with (
            edit(causal_model, {point: lambda h, positions: 2 * h}),
            capture(causal_model, [f"{path}.2:in"]) as run,
        ):
            torch.testing.assert_close(run(x)[f"{path}.2:in"], 2 * before, rtol=0, atol=0)


def test_an_edit_that_changes_nothing_is_bit_equal(causal_model):
    x = tokens(2, 7)
    expected = causal_model(x).logits
    point = f"{blocks(causal_model)}.1"
    same = lambda h, positions: h.clone()  # noqa: E731
    with edit(causal_model, {f"{point}:out": same, f"{point}:in": same}):
        assert torch.equal(causal_model(x).logits, expected)


def test_an_edit_reaches_inputs_by_keyword_and_outputs_in_tuples(causal_model):
    x = tokens(2, 7)
    path = f"{blocks(causal_model)}.1"
    attention = "self_attn" if blocks(causal_model) == "model.layers" else "attn"
    expected = causal_model(x).logits
    for side in ("in", "out"):
        with edit(causal_model, {f"{path}.{attention}:{side}": lambda h, positions: -h}):
            assert not torch.allclose(causal_model(x).logits, expected, atol=1e-3)


def test_edits_of_several_layers_apply_in_the_order_of_the_forward(causal_model):
    x, path = tokens(2, 7), blocks(causal_model)
    order = []
    edits = {f"{path}.{i}:out": lambda h, positions, i=i: order.append(i) or h for i in (3, 0, 2)}
    with edit(causal_model, edits):
        causal_model(x)
    assert order == [0, 2, 3]


def test_gradients_flow_through_an_edit(causal_model):
    shift = torch.zeros(23, requires_grad=True)
    with edit(causal_model, {f"{blocks(causal_model)}.1:out": lambda h, positions: h + shift}):
        causal_model(tokens(2, 7)).logits.square().sum().backward()
    assert shift.grad is not None
    assert shift.grad.abs().min() > 0


def test_the_stream_keeps_its_dtype(causal_model):
    causal_model.to(torch.bfloat16)
    seen = []

    def in_float32(h: Tensor, positions: Tensor) -> Tensor:
        seen.append(h.dtype)
        return h.float() * 2

    with edit(causal_model, {f"{blocks(causal_model)}.1:out": in_float32}):
        assert causal_model(tokens(2, 7)).logits.dtype == torch.bfloat16
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(
    ("fn", "got"),
    [(lambda h, p: h[:, :1], r"\(2, 1, 23\)"), (lambda h, p: None, "NoneType")],
)
def test_an_edit_must_keep_the_shape(causal_model, fn, got):
    point = f"{blocks(causal_model)}.1:out"
    with (
        pytest.raises(
            ValueError, match=rf"the edit of {point} must return the shape .*, got {got}"
        ),
        edit(causal_model, {point: fn}),
    ):
        causal_model(tokens(2, 7))
    assert n_hooks(causal_model) == 0


def test_hooks_are_removed_when_an_edit_raises(causal_model):
    def fails(h: Tensor, positions: Tensor) -> Tensor:
        raise KeyError("inside")

    with pytest.raises(KeyError), edit(causal_model, {f"{blocks(causal_model)}.1:out": fails}):
        causal_model(tokens(2, 7))
    assert n_hooks(causal_model) == 0


def test_positions_of_one_forward(causal_model):
    recorder = Recorder()
    with edit(causal_model, {f"{blocks(causal_model)}.1:out": recorder}):
        causal_model(tokens(2, 7))
    assert recorder.positions[0].tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 2


def test_positions_count_from_the_first_attended_token(causal_model):
    recorder = Recorder()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    with edit(causal_model, {f"{blocks(causal_model)}.1:in": recorder}):
        causal_model(tokens(2, 7), attention_mask=mask)
    expected = [[-3, -2, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]
    assert recorder.positions[0].tolist() == expected


def test_position_ids_count_where_no_mask_is_given(causal_model):
    recorder = Recorder()
    ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with edit(causal_model, {f"{blocks(causal_model)}.1:out": recorder}):
        causal_model(tokens(1, 7), position_ids=ids)
    assert recorder.positions[0].tolist() == ids.tolist()


def test_positions_continue_a_cache_that_was_filled_before(causal_model):
    recorder = Recorder()
    x = tokens(2, 11)
    cache = given_cache(causal_model, causal_model(x[:, :7], use_cache=True))
    with edit(causal_model, {f"{blocks(causal_model)}.1:out": recorder}):
        causal_model(x[:, 7:], use_cache=True, **cache)
    assert recorder.positions[0].tolist() == [[7, 8, 9, 10]] * 2


def test_positions_in_a_vision_model(vit_model):
    recorder = Recorder()
    block = next(name for name, m in vit_model.named_modules() if type(m).__name__ == "ViTLayer")
    with edit(vit_model, {f"{block}:out": recorder}):
        vit_model(torch.zeros(2, 3, 21, 21))
    assert recorder.positions[0].tolist() == [list(range(10))] * 2


def generate(model: nn.Module, x: Tensor, **options: object) -> tuple[Tensor, Recorder]:
    recorder = Recorder(size=2.0)
    torch.manual_seed(13)
    with edit(model, {f"{blocks(model)}.1:out": recorder}):
        out = model.generate(x, max_new_tokens=17, min_new_tokens=17, pad_token_id=0, **options)
    return out, recorder


@pytest.mark.parametrize(
    "strategy",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.3},
        {"do_sample": False, "num_beams": 3},
    ],
    ids=["greedy", "sampled", "beam"],
)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
def test_generation_is_the_same_with_and_without_a_cache(causal_model, strategy, padded):
    x = tokens(2, 7)
    mask = torch.ones_like(x)
    if padded:
        mask[0, :3] = 0
    options = {"attention_mask": mask, **strategy}
    cached, by_step = generate(causal_model, x, use_cache=True, **options)
    whole, by_forward = generate(causal_model, x, use_cache=False, **options)
    assert cached.tolist() == whole.tolist()
    unedited = causal_model.generate(
        x, attention_mask=mask, max_new_tokens=17, pad_token_id=0, do_sample=False
    )
    assert unedited.tolist() != cached.tolist()

    n_beams = strategy.get("num_beams", 1)
    start = torch.tensor([[-3], [0]] if padded else [[0], [0]]).repeat_interleave(n_beams, dim=0)
    assert len(by_step.positions) == len(by_forward.positions) == 17
    for step, (new, all_positions) in enumerate(
        zip(by_step.positions, by_forward.positions, strict=True)
    ):
        expected = start + torch.arange(7 + step)
        assert all_positions.tolist() == expected.tolist()
        assert new.tolist() == (expected if step == 0 else expected[:, -1:]).tolist()


@pytest.mark.parametrize(
    "way", [{"prefill_chunk_size": 3}, {"cache_implementation": "static"}], ids=["chunks", "static"]
)
def test_other_ways_to_fill_the_cache_keep_the_positions_of_text(causal_model, way):
    x = tokens(2, 7)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    expected, _ = generate(causal_model, x, attention_mask=mask, do_sample=False, use_cache=False)
    result, recorder = generate(causal_model, x, attention_mask=mask, do_sample=False, **way)
    assert result.tolist() == expected.tolist()
    positions = torch.cat(recorder.positions, dim=1)
    assert positions[0, 3:].tolist() == list(range(20))
    assert positions[0, :3].max() <= 0
    assert positions[1].tolist() == list(range(23))


def test_left_padding_does_not_change_what_is_generated(causal_model):
    """An edit by position steers a padded prompt as it steers the prompt alone."""
    x = tokens(1, 5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), x], dim=1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(x)], dim=1)
    alone, _ = generate(causal_model, x, do_sample=False)
    other_prompt, _ = generate(causal_model, padded, attention_mask=mask, do_sample=False)
    assert other_prompt[:, 3:].tolist() == alone.tolist()


def test_nested_edits_and_captures_each_know_the_positions(causal_model):
    outer, inner = Recorder(), Recorder()
    path = blocks(causal_model)
    with edit(causal_model, {f"{path}.1:out": outer}):
        with edit(causal_model, {f"{path}.1:out": inner}):
            causal_model(tokens(2, 7))
        causal_model(tokens(2, 5))
    assert [p.shape[1] for p in outer.positions] == [7, 5]
    assert [p.shape[1] for p in inner.positions] == [7]
    assert n_hooks(causal_model) == 0


@pytest.mark.real
def test_greedy_generation_of_smollm2_under_an_edit_needs_no_cache(smollm2):
    """In float32: in bfloat16 the two ways of attention round apart, whatever the edit."""
    model = copy.deepcopy(smollm2.model).float()
    x = smollm2.tokenizer("The weather today is", return_tensors="pt")
    direction = torch.randn(576, generator=torch.Generator().manual_seed(0))

    def steer(h: Tensor, positions: Tensor) -> Tensor:
        return h + 4 * (positions[..., None] > 0) * direction

    outs = [model.generate(**x, max_new_tokens=12, do_sample=False)]
    for use_cache in (True, False):
        with edit(model, {"model.layers.15:out": steer}):
            outs.append(
                model.generate(**x, max_new_tokens=12, do_sample=False, use_cache=use_cache)
            )
    assert outs[1].tolist() == outs[2].tolist()
    assert outs[1].tolist() != outs[0].tolist()
