import pytest
import torch
from torch import nn

from sae.evaluate.resume_forward import Replay
from tests.families import custom_hooks


def calls_of(model, action):
    """How often each block runs its own forward during an action."""
    counts = [0] * len(model.model.layers)
    hooks = []
    for i, layer in enumerate(model.model.layers):

        def count(*_, i=i):
            counts[i] += 1

        hooks.append(layer.mlp.register_forward_hook(count))
    try:
        action()
    finally:
        for hook in hooks:
            hook.remove()
    return counts


@pytest.mark.parametrize(
    ("place", "again"),
    [
        ("model.layers.1:out", [0, 0, 1, 1]),
        ("model.layers.1:in", [0, 1, 1, 1]),
        ("model.layers.1.mlp:out", [0, 1, 1, 1]),
        ("model.layers.3:out", [0, 0, 0, 0]),
    ],
)
def test_blocks_before_the_hook_point_are_not_run_again(model, tokens, place, again):
    replay = Replay(model, place)
    base = replay.base(tokens)
    assert torch.equal(base.logits, model(tokens, use_cache=False).logits)
    counts = calls_of(model, lambda: replay.spliced(tokens, lambda _: base.stream))
    assert counts == again
    assert torch.equal(replay.spliced(tokens, lambda _: base.stream), base.logits)


def test_a_replacement_gives_what_a_full_forward_gives(model, tokens, hook_point):
    replay = Replay(model, hook_point)
    replay.base(tokens)

    def double(module, args, output):
        return output * 2

    handle = model.model.layers[1].register_forward_hook(double)
    expected = model(tokens, use_cache=False).logits
    handle.remove()
    assert torch.equal(replay.spliced(tokens, lambda stream: stream * 2), expected)


def test_the_model_is_as_before_even_after_an_error(model, tokens, hook_point):
    replay = Replay(model, hook_point)
    expected = replay.base(tokens).logits

    def fail(stream):
        raise KeyError("no stream today")

    with pytest.raises(KeyError, match="no stream today"):
        replay.spliced(tokens, fail)
    assert torch.equal(model(tokens, use_cache=False).logits, expected)
    other = model(tokens.flip(0), use_cache=False).logits
    torch.testing.assert_close(other.flip(0), expected, rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not custom_hooks(model)


class Looped(nn.Module):
    """Runs its two blocks twice, so that what they returned first is not what comes next."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(37, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.middle = nn.ModuleList([nn.Identity()])

    def forward(self, input_ids, use_cache=False):
        h = self.embed(input_ids)
        h = self.middle[0](self.layers[1](self.layers[0](h)))
        h = self.layers[1](self.layers[0](h))
        return type("Output", (), {"logits": h @ self.embed.weight.T})


def test_blocks_that_run_twice_are_computed(tokens):
    torch.manual_seed(0)
    model = Looped().requires_grad_(False)
    replay = Replay(model, "middle.0:out")
    base = replay.base(tokens)
    zero = replay.spliced(tokens, torch.zeros_like)
    h = torch.zeros(*tokens.shape, 8)
    expected = model.layers[1](model.layers[0](h)) @ model.embed.weight.T
    torch.testing.assert_close(zero, expected)
    assert not torch.allclose(base.logits, zero)


class Stateful(nn.Module):
    """A block that tells the next module something beside what it returns."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(37, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Identity()])
        self.passes = 0
        self.layers[0].register_forward_pre_hook(self.count)

    def count(self, module, args):
        self.passes += 1

    def forward(self, input_ids, use_cache=False):
        h = self.layers[1](self.layers[0](self.embed(input_ids)))
        return type("Output", (), {"logits": h @ self.embed.weight.T * self.passes})


def test_a_model_that_gives_other_logits_in_a_replay_is_run_in_full(tokens, caplog):
    model = Stateful().requires_grad_(False)
    replay = Replay(model, "layers.1:out")
    replay.base(tokens)
    assert "Stateful cannot be run from layers.1:out on" in caplog.text
    seen = []
    model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    replay.spliced(tokens, lambda stream: stream)
    assert seen == [1]
    assert "forward" not in vars(model.layers[0])
