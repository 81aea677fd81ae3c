import copy

import pytest
import torch

from activations_cache.hooks import capture
from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.steer.config import Ablate, Add, Clamp, Scale
from sae.steer.steering import steered_stream, steering


def edited_densely(dictionary, stream, changes):
    """Encode, change activations, decode, and put back the error: the definition, in float64."""
    exact = SparseAutoencoder(dictionary.config)
    exact.load_state_dict(dictionary.state_dict())
    exact = exact.double()
    x = stream.flatten(0, 1).double()
    f = exact.encode_dense(x)
    error = x - exact.decode(f)
    changed = f.clone()
    for latent, change in changes.items():
        changed[:, latent] = change(f[:, latent])
    return (exact.decode(changed) + error).view(stream.shape).detach()


@pytest.fixture
def firing_latent(dictionary, stream):
    """A latent that fires in some rows and not in others."""
    share = (dictionary.encode_dense(stream.flatten(0, 1)) != 0).double().mean(0)
    return int((share - 0.4).abs().argmin())


@pytest.mark.parametrize("first", [0, 1, 4])
def test_operations_equal_encode_change_decode_and_error(
    dictionary, stats, stream, positions, firing_latent, first
):
    a, b, c, d = [firing_latent, *(i for i in range(23) if i != firing_latent)][:4]
    operations = [
        Clamp(latent=a, value=2.0),
        Add(latent=b, value=-1.5, unit="absolute"),
        Scale(latent=c, factor=3.0),
        Ablate(latent=d),
    ]
    fn = steered_stream(dictionary, operations, stats=stats, first_position=first)
    found = fn(stream, positions)
    maximum = float(stats.max_activation[a])
    expected = edited_densely(
        dictionary,
        stream,
        {
            a: lambda f: torch.full_like(f, 2 * maximum),
            b: lambda f: f - 1.5,
            c: lambda f: 3 * f,
            d: torch.zeros_like,
        },
    )
    torch.testing.assert_close(found[:, first:].double(), expected[:, first:], rtol=0, atol=5e-6)
    assert torch.equal(found[:, :first], stream[:, :first])
    assert not torch.allclose(found[:, first:], stream[:, first:])


def test_clamping_moves_the_stream_along_the_direction(dictionary, stream, positions):
    fn = steered_stream(dictionary, [Clamp(latent=3, value=4.0, unit="absolute")], first_position=0)
    moved = (fn(stream, positions) - stream).flatten(0, 1)
    own = dictionary.encode_dense(stream.flatten(0, 1))[:, 3:4]
    torch.testing.assert_close(moved, (4 - own) * dictionary.direction(3), rtol=1e-4, atol=1e-5)


def test_clamping_to_its_own_value_is_the_identity(dictionary, stream, positions, firing_latent):
    f = dictionary.encode_dense(stream.flatten(0, 1))[:, firing_latent]
    row = int(f.argmax())
    one, at = stream.flatten(0, 1)[row].view(1, 1, -1), torch.tensor([[5]])
    own = float(
        dictionary.encode(one[0]).values[dictionary.encode(one[0]).indices == firing_latent]
    )
    assert own > 0
    clamp = Clamp(latent=firing_latent, value=own, unit="absolute")
    assert torch.equal(steered_stream(dictionary, [clamp])(one, at), one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "operation",
    [
        Add(latent=3, value=0.0, unit="absolute"),
        Add(latent=3, value=0.0),
        Scale(latent=3, factor=1.0),
    ],
)
def test_no_change_keeps_every_bit(dictionary, stats, stream, positions, operation, dtype):
    stream = stream.to(dtype)
    stream[0, 2, 1] = -0.0
    found = steered_stream(dictionary, [operation], stats=stats)(stream, positions)
    assert found.dtype == dtype
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(as_bits), stream.view(as_bits))


def test_ablating_a_silent_latent_keeps_every_bit(dictionary, stream, positions):
    dictionary.b_enc.data[5] = -1e4
    stream[0, 2, 1] = -0.0
    found = steered_stream(dictionary, [Ablate(latent=5)])(stream, positions)
    assert torch.equal(found.view(torch.int32), stream.view(torch.int32))


def test_ablating_changes_only_where_the_latent_fires(dictionary, stream, positions, firing_latent):
    fn = steered_stream(dictionary, [Ablate(latent=firing_latent)], first_position=0)
    changed = (fn(stream, positions) != stream).any(-1).flatten()
    fires = dictionary.encode_dense(stream.flatten(0, 1))[:, firing_latent] != 0
    assert torch.equal(changed, fires)
    assert 0 < int(fires.sum()) < len(fires)


def test_sinks_and_padding_are_left_alone(dictionary, stream):
    positions = torch.arange(7).expand(3, 7) - torch.tensor([[0], [2], [9]])
    clamp = Clamp(latent=3, value=9.0, unit="absolute")
    changed = (steered_stream(dictionary, [clamp])(stream, positions) != stream).any(-1)
    assert torch.equal(changed, positions >= 1)


def test_a_bfloat16_stream_is_edited_in_float32(dictionary, positions, stream):
    stream = stream.bfloat16()
    clamp = Clamp(latent=3, value=2.0, unit="absolute")
    found = steered_stream(dictionary, [clamp], first_position=0)(stream, positions)
    exact = edited_densely(dictionary, stream.float(), {3: lambda f: torch.full_like(f, 2)})
    assert torch.equal(found, exact.float().bfloat16())


def test_steering_reaches_the_model_and_ends_with_the_context(model, hook_point, dictionary):
    tokens = torch.randint(37, (3, 7), generator=torch.Generator().manual_seed(0))
    base = model(tokens, use_cache=False).logits
    clamp = Clamp(latent=3, value=9.0, unit="absolute")
    with steering(model, hook_point, dictionary, [clamp]):
        steered = model(tokens, use_cache=False).logits
        with capture(model, ["model.layers.2:in"]) as run:
            after = run(tokens)["model.layers.2:in"]
    with capture(model, [hook_point]) as run:
        before = run(tokens)[hook_point]
    fn = steered_stream(dictionary, [clamp])
    torch.testing.assert_close(after, fn(before, torch.arange(7).expand(3, 7)))
    assert torch.equal(steered[:, 0], base[:, 0])
    assert not torch.allclose(steered[:, 1:], base[:, 1:])
    assert torch.equal(model(tokens, use_cache=False).logits, base)


def test_hooks_are_removed_after_an_error(model, hook_point, dictionary):
    clamp = Clamp(latent=3, value=9.0, unit="absolute")

    def fail():
        with steering(model, hook_point, dictionary, [clamp]):
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_two_layers_are_steered_in_order(model, dictionary):
    tokens = torch.randint(37, (3, 7), generator=torch.Generator().manual_seed(0))
    clamp = [Clamp(latent=3, value=9.0, unit="absolute")]
    with (
        steering(model, "model.layers.0:out", dictionary, clamp),
        steering(model, "model.layers.1:out", dictionary, clamp),
        capture(model, ["model.layers.1:out"], stop=False) as run,
    ):
        both = run(tokens)["model.layers.1:out"]
    with (
        steering(model, "model.layers.0:out", dictionary, clamp),
        capture(model, ["model.layers.1:out"]) as run,
    ):
        first = run(tokens)["model.layers.1:out"]
    fn = steered_stream(dictionary, clamp)
    torch.testing.assert_close(both, fn(first, torch.arange(7).expand(3, 7)))


def test_a_unit_without_statistics_is_refused(dictionary, stats):
    clamp = [Clamp(latent=3, value=8.0)]
    with pytest.raises(ValueError, match=r"stats must be given .* run `sae evaluate`"):
        steered_stream(dictionary, clamp)
    with pytest.raises(ValueError, match=r"latent 22 must have fired .* silent in 101 rows"):
        steered_stream(dictionary, [Add(latent=22, value=1.0)], stats=stats)
    stats.max_activation = torch.ones(19)
    with pytest.raises(ValueError, match=r"stats must be of a dictionary with d_sae=23, got 19"):
        steered_stream(dictionary, clamp, stats=stats)


def test_wrong_operations_are_refused(dictionary):
    with pytest.raises(ValueError, match="operations must name at least one latent, got none"):
        steered_stream(dictionary, [])
    with pytest.raises(ValueError, match="latent must be below d_sae=23, got 23"):
        steered_stream(dictionary, [Ablate(latent=23)])
    with pytest.raises(ValueError, match=r"operations must name a latent once, got \[3, 3\]"):
        steered_stream(dictionary, [Ablate(latent=3), Scale(latent=3, factor=2.0)])
    config = SAEConfig(
        d_in=8, d_sae=23, d_out=5, activation=dictionary.config.activation, b_in="none"
    )
    with pytest.raises(ValueError, match=r"d_out must be d_in=8 .* got 5"):
        steered_stream(SparseAutoencoder(config), [Ablate(latent=3)])


@pytest.mark.parametrize("norm", ["rms", "layer_norm"])
def test_a_dictionary_with_a_norm_of_its_input_steers_in_units_of_the_token(norm):
    config = SAEConfig(
        d_in=11, d_sae=23, activation=ReLU(), input_norm=norm, input_scale=0.7, output_scale=0.4
    )
    made, generator = SparseAutoencoder(config), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    h = torch.randn(13, 11, generator=generator) * torch.linspace(0.1, 30, 13)[:, None]
    exact = copy.deepcopy(made).double()
    before = exact.encode_dense(h.double())
    after = before.clone()
    after[:, 7] += 2.0
    moved = exact.decode(after, h.double()) - exact.decode(before, h.double())
    fn = steered_stream(made, [Add(latent=7, value=2.0, unit="absolute")], first_position=0)
    found = fn(h[None], torch.arange(13)[None])[0]
    torch.testing.assert_close(found.double(), h + moved, rtol=1e-5, atol=1e-4)
