"""The identities of steering: clamp, add, scale, ablate, cap, floor, exact in float64."""

import copy

import pytest
import torch

from activations_cache.hooks import capture
from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder
from sae.steer.edits import Edit, EditedRows, LatentEdits, Patch, Push, Splice, read_latents
from sae.steer.steering import Steering, apply_at

KINDS = [TopK(k=5), ReLU(), JumpReLU(threshold=0.3), BatchTopK(k=5), Gated()]


def randomised(config, seed=5):
    made, generator = SparseAutoencoder(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if isinstance(config.activation, BatchTopK):
            made.threshold.fill_(0.4)
        if isinstance(config.activation, JumpReLU):
            made.threshold.abs_()
    return made.requires_grad_(False)


def rows_of(stream):
    return EditedRows(
        *[stream.flatten(0, 1)] * 2, torch.arange(stream.shape[1]).repeat(len(stream))
    )


def everywhere(change, stream):
    """The whole stream under a change."""
    positions = torch.arange(stream.shape[1]).expand(stream.shape[:2])
    return apply_at(change, torch.ones_like(positions, dtype=torch.bool), stream, stream, positions)


def as_bits(tensor):
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


FORMS = ("plain", "rms", "layer_norm", "by_decoder_norm")
CASES = [
    pytest.param(activation, form, id=f"{activation.kind}-{form}")
    for activation in KINDS
    for form in FORMS
    if not (isinstance(activation, Gated) and form == "by_decoder_norm")  # its config refuses it
]


@pytest.mark.parametrize(("activation", "form"), CASES)
def test_operations_equal_encode_change_decode_and_error(activation, form):
    config = SAEConfig(
        d_in=11, d_sae=23, activation=activation, input_scale=0.7, output_scale=0.4,
        input_norm=form if form in ("rms", "layer_norm") else "none",
        gate_by_decoder_norm=form == "by_decoder_norm",
    )  # fmt: skip
    dictionary = randomised(config).double()
    x = torch.randn(13, 11, generator=torch.Generator().manual_seed(4)).double()
    x *= torch.linspace(0.1, 30, 13)[:, None]
    f = dictionary.encode_dense(x)
    a, b, c, d, e, g, silent = (f != 0).double().mean(0).argsort(descending=True)[:7].tolist()
    placed = dictionary.at("here:out")
    edits = [
        Edit(placed, latent=a, clamp=2.0), Edit(placed, latent=b, add=-1.5),
        Edit(placed, latent=c, scale=3.0), Edit(placed, latent=d, ablate=True),
        Edit(placed, latent=e, cap=0.2), Edit(placed, latent=g, floor=0.3),
        Edit(placed, latent=silent, clamp=-4.0, only_firing=True),
    ]  # fmt: skip
    changed = f.clone()
    changed[:, a] = 2.0
    changed[:, b] -= 1.5
    changed[:, c] *= 3.0
    changed[:, d] = 0
    changed[:, e] = changed[:, e].clamp_max(0.2)
    changed[:, g] = changed[:, g].clamp_min(0.3)
    changed[:, silent] = -4.0 * (changed[:, silent] != 0)
    expected = dictionary.decode(changed, x) + x - dictionary.decode(f, x)
    result = LatentEdits(edits)(EditedRows(x, x, torch.arange(13)))
    torch.testing.assert_close(result.h, expected, rtol=1e-12, atol=1e-10)
    assert torch.equal(result.is_changed, (changed != f).any(1))
    assert not torch.allclose(result.h, x)


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.kind)
def test_few_latents_read_as_all(activation):
    dictionary = randomised(SAEConfig(d_in=11, d_sae=23, activation=activation)).double()
    x = torch.randn(13, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    latents = torch.tensor([7, 0, 22, 7])
    whole = dictionary.encode_dense(x)
    torch.testing.assert_close(read_latents(dictionary, x, latents), whole[:, latents])
    assert (whole[:, latents] != 0).any()


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.kind)
def test_only_topk_encodes_every_latent(monkeypatch, activation):
    dictionary = randomised(SAEConfig(d_in=11, d_sae=23, activation=activation))
    whole, encode = [], dictionary.encode
    monkeypatch.setattr(dictionary, "encode", lambda x: whole.append(1) or encode(x))
    read_latents(dictionary, torch.ones(13, 11), torch.tensor([3]))
    assert bool(whole) == isinstance(activation, TopK)


def test_strengths_in_units_of_the_maximum_and_of_the_norm(placed, stream):
    flat = stream.flatten(0, 1)
    clean = read_latents(placed, flat, torch.tensor([3]))
    direction, norms = placed.direction(3), flat.norm(dim=1, keepdim=True)
    for edit, value in (
        (Edit(placed, latent=3, clamp="2x max"), 2 * placed.stats.max_activation[3]),
        (Edit(placed, latent=3, clamp="-2x"), -2 * placed.stats.max_activation[3]),
        (Edit(placed, latent=3, clamp="0.5x norm"), norms / direction.norm() / 2),
    ):  # fmt: skip
        moved = (everywhere(LatentEdits([edit]), stream) - stream).flatten(0, 1)
        torch.testing.assert_close(moved, (value - clean) * direction, rtol=1e-4, atol=1e-4)


def test_half_a_norm_is_half_a_norm_whatever_the_input_norm(stream):
    for norm in ("none", "rms", "layer_norm"):
        config = SAEConfig(d_in=8, d_sae=23, activation=ReLU(), input_norm=norm, input_scale=0.3)
        edit = Edit(randomised(config).at("here:out"), latent=3, add="0.5x norm")
        moved = everywhere(LatentEdits([edit]), stream) - stream
        torch.testing.assert_close(moved.norm(dim=-1), stream.norm(dim=-1) / 2, rtol=1e-4, atol=0)


def test_clamping_to_its_own_value_is_the_identity(placed, stream):
    f = placed.encode_dense(stream.flatten(0, 1))
    row, latent = divmod(int(f.argmax()), 23)
    one = stream.flatten(0, 1)[row].view(1, 1, -1)
    clean = float(read_latents(placed, one[0], torch.tensor([latent])))
    assert clean > 0
    result = everywhere(LatentEdits([Edit(placed, latent=latent, clamp=clean)]), one)
    assert torch.equal(as_bits(result), as_bits(one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [{"add": 0.0}, {"add": "0x max"}, {"scale": 1.0}], ids=str)
def test_no_change_keeps_every_bit(placed, stream, words, dtype):
    stream = stream.to(dtype)
    stream[0, 2, 1] = -0.0
    result = everywhere(LatentEdits([Edit(placed, latent=3, **words)]), stream)
    assert result.dtype == dtype
    assert torch.equal(as_bits(result), as_bits(stream))


def test_ablating_changes_only_where_the_latent_fires(placed, stream):
    share = (placed.encode_dense(stream.flatten(0, 1)) != 0).double().mean(0)
    latent = int((share - 0.4).abs().argmin())
    result = everywhere(LatentEdits([Edit(placed, latent=latent, ablate=True)]), stream)
    fires = placed.encode_dense(stream.flatten(0, 1))[:, latent] != 0
    assert torch.equal((as_bits(result) != as_bits(stream)).any(-1).flatten(), fires)
    assert 0 < int(fires.sum()) < len(fires)


def test_a_bfloat16_stream_is_edited_in_float32(placed, stream):
    stream = stream.bfloat16()
    edits = LatentEdits([Edit(placed, latent=3, clamp=2.0)])
    exact = everywhere(edits, stream.float())
    assert torch.equal(everywhere(edits, stream), exact.bfloat16())
    assert not torch.equal(exact, exact.bfloat16())


def test_a_control_arm_moves_as_far_in_another_direction(placed, stream):
    along = torch.randn(8, generator=torch.Generator().manual_seed(9)) * 7
    everywhere_change = (
        everywhere(LatentEdits([Edit(placed, latent=3, clamp=9.0)]), stream) - stream
    )
    arm = everywhere(LatentEdits([Edit(placed, latent=3, clamp=9.0, along=along)]), stream) - stream
    torch.testing.assert_close(everywhere_change.norm(dim=-1), arm.norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(arm, along.expand_as(arm), dim=-1)
    torch.testing.assert_close(cosine.abs(), torch.ones(3, 7))


def test_splicing_with_and_without_the_error(placed, stream):
    x_hat = placed(stream.flatten(0, 1)).view(stream.shape)
    torch.testing.assert_close(everywhere(Splice(placed), stream), x_hat)
    torch.testing.assert_close(everywhere(Splice(placed, keep_error=True), stream), stream)
    assert not torch.allclose(x_hat, stream, rtol=0.1)


def test_patching_puts_rows_to_their_positions(stream):
    other = -stream[0, :4]
    result = everywhere(Patch("here:out", other), stream)
    assert torch.equal(result[:, :4], other.expand(3, 4, 8))
    assert torch.equal(result[:, 4:], stream[:, 4:])
    mean = stream.mean(dim=(0, 1))
    assert torch.equal(everywhere(Patch("here:out", mean), stream), mean.expand(3, 7, 8))


def test_pushing_adds_a_vector_in_float32(stream):
    vector = torch.linspace(-1, 1, 8) * 1e-3
    result = everywhere(Push("here:out", vector), stream.bfloat16())
    assert torch.equal(result, (stream.bfloat16().float() + vector).bfloat16())
    assert torch.equal(
        as_bits(everywhere(Push("here:out", 0 * vector), -0 * stream)), as_bits(-0 * stream)
    )


def test_a_transcoder_is_read_in_one_place_and_written_in_another(model):
    config = SAEConfig(d_in=8, d_sae=23, d_out=8, activation=ReLU(), b_in="none", input_norm="rms")
    dictionary = randomised(config)
    hook_read, writes = "model.layers.1.mlp:in", "model.layers.1.mlp:out"
    placed = dictionary.at(hook_read, writes)
    tokens = torch.randint(37, (3, 7), generator=torch.Generator().manual_seed(0))
    with capture(model, [hook_read, writes, "model.layers.2:in"], stop=False) as run:
        before = run(tokens)
        with Steering(model, [Edit(placed, latent=4, add=2.0)], first_position=0) as steering:
            after = run(tokens)
    x = before[hook_read].flatten(0, 1).double()
    exact = copy.deepcopy(dictionary).double()
    f = exact.encode_dense(x)
    more = f + 2.0 * (torch.arange(23) == 4)
    moved = (exact.decode(more, x) - exact.decode(f, x)).view(3, 7, 8)
    result = after["model.layers.2:in"] - before["model.layers.2:in"]
    torch.testing.assert_close(result.double(), moved, rtol=1e-3, atol=1e-4)
    assert steering.n_tokens == 21


def test_gradients_flow_through_an_edit(model, placed):
    start = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with Steering(model, [Edit(placed, latent=3, clamp=9.0)]):
        model(inputs_embeds=start, use_cache=False).logits.sum().backward()
    assert start.grad.abs().min() > 0
