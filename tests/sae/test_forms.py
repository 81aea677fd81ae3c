"""The forms of one autoencoder against their definitions, in float64."""

import dataclasses
import itertools
import json

import pytest
import torch

import sae
from activations_cache import seals
from sae.activations import encode_batch, to_dense
from sae.architecture import BatchTopK, Gated, GroupMax, JumpReLU, ReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.pretrained import DictionaryFormatError

D_IN, D_SAE, D_OUT, BATCH, K = 7, 23, 11, 5, 3
ACTIVATIONS = [TopK(k=K), ReLU(), BatchTopK(k=K), GroupMax(k=1), JumpReLU(), Gated()]
FORMS = [
    {"b_in": "own"},
    {"input_norm": "layer_norm"},
    {"input_norm": "rms", "skip": True},
    {"gate_by_decoder_norm": True},
    {"gate_by_decoder_norm": True, "b_in": "none", "input_norm": "layer_norm", "skip": True},
    {"d_out": D_OUT, "output_scale": 1.7, "b_in": "own", "skip": True},
]
LATER = ("output_scale", "input_norm", "gate_by_decoder_norm", "skip", "inputs", "outputs")
CASES = [
    pytest.param(activation, form, id=f"{activation.kind}-{'-'.join(form)}")
    for activation, form in itertools.product(ACTIVATIONS, FORMS)
    if not (activation.kind == "gated" and "gate_by_decoder_norm" in form)
]


def made(activation, dtype=torch.float64, **form) -> SparseAutoencoder:
    config = SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, input_scale=0.31, **form)
    dictionary = SparseAutoencoder(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if isinstance(activation, BatchTopK):
            dictionary.threshold.fill_(0.7)
        if isinstance(activation, JumpReLU):
            dictionary.threshold.abs_()
    return dictionary.to(dtype)


def rows(dtype=torch.float64) -> torch.Tensor:
    x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x * 4 + 2).to(dtype)


def rewrite(path, drop=(), **changes) -> None:
    record = json.loads((path / "config.json").read_text())
    fields_left = {key: value for key, value in record.items() if key not in drop}
    assert len(record) == len(fields_left) + len(drop)
    seals.write(path, {"config.json": json.dumps({**fields_left, **changes}).encode()})


def definition(d: SparseAutoencoder, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and output written out; the masks of what fires carry no gradient."""
    c, act = d.config, d.config.activation
    mean, std, u = 0.0, 1.0, x
    if c.input_norm == "layer_norm":
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        u = (x - mean) / (std + 1e-5)
    if c.input_norm == "rms":
        std = (x**2).mean(1, keepdim=True) ** 0.5
        u = x / std
    u = u * c.input_scale
    b_in = {"none": 0.0, "b_dec": d.b_dec, "own": getattr(d, "b_in", None)}[c.b_in]
    pi = (u - b_in) @ d.enc_rows.T
    if isinstance(act, Gated):
        a = torch.relu(pi * d.r_mag.exp() + d.b_mag) * (pi + d.b_gate > 0)
    else:
        norms = d.dec_rows.norm(dim=1) if c.gate_by_decoder_norm else torch.ones(D_SAE).double()
        g = (pi + d.b_enc) * norms
        if isinstance(act, TopK):
            fires = g >= g.sort(dim=1, descending=True).values[:, K - 1 : K]
        elif isinstance(act, GroupMax):
            fires = (g >= g.max(dim=1, keepdim=True).values) & (g > 0)
        else:
            fires = g > (0.0 if d.threshold is None else d.threshold)
        a = (torch.relu(g) if isinstance(act, TopK) else g) * fires / norms
    y = a @ d.dec_rows + d.b_dec + (u @ d.skip_rows.T if c.skip else 0.0)
    return a, y / (c.output_scale or c.input_scale) * std + mean


@pytest.mark.parametrize(("activation", "form"), CASES)
def test_encode_decode_and_gradients_equal_the_definition(activation, form):
    dictionary, x = made(activation, **form), rows()
    names = [n for n, _ in dictionary.named_parameters() if n != "threshold"]
    weights = [dictionary.get_parameter(n) for n in names]
    acts, x_hat = definition(dictionary, x)
    weigh = torch.randn(x_hat.shape, generator=torch.Generator().manual_seed(9)).double()
    expected = torch.autograd.grad((x_hat * weigh).sum(), weights, allow_unused=True)
    latents = dictionary.encode(x)
    assert (latents.indices.diff(dim=1) >= 0).all()
    torch.testing.assert_close(to_dense(latents, D_SAE), acts)
    torch.testing.assert_close(dictionary.encode_dense(x), acts)
    for got in (
        dictionary(x),
        dictionary.decode(latents, x),
        dictionary.decode(dictionary.encode_dense(x), x),
    ):
        torch.testing.assert_close(got, x_hat)
        result = torch.autograd.grad((got * weigh).sum(), weights, allow_unused=True)
        for name, one, other in zip(names, result, expected, strict=True):
            wanted = torch.zeros_like(one) if other is None else other  # b_gate only gates
            torch.testing.assert_close(one, wanted, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("activation", "form"), CASES)
def test_every_form_is_saved_and_loaded_bit_equal(tmp_path, activation, form):
    dictionary, x = made(activation, torch.float32, **form), rows(torch.float32)
    back = sae.load(sae.save(dictionary, tmp_path / "d"))
    assert back.config == dictionary.config
    state = back.state_dict()
    assert state.keys() == dictionary.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in dictionary.state_dict().items())
    assert torch.equal(back(x), dictionary(x))
    if isinstance(activation, GroupMax):
        with pytest.raises(DictionaryFormatError, match=r"latents must be all 23 for .*'groupmax'"):
            sae.load(tmp_path / "d", latents=slice(5, 10))
        return
    part = sae.load(tmp_path / "d", latents=slice(5, 10))
    assert part.config == dataclasses.replace(dictionary.config, d_sae=5)
    for name, whole in dictionary.state_dict().items():
        per_latent = whole.dim() > 0 and len(whole) == D_SAE
        assert torch.equal(part.state_dict()[name], whole[5:10] if per_latent else whole), name


def test_a_file_from_before_the_new_fields_has_their_defaults(tmp_path):
    dictionary = made(TopK(k=K), torch.float32)
    rewrite(sae.save(dictionary, tmp_path / "d"), drop=LATER)
    assert sae.load(tmp_path / "d").config == dictionary.config


@pytest.mark.parametrize(
    "changes", [{"b_in": "x"}, {"input_norm": "batch"}, {"skip": "no"}, {"gate_by_decoder_norm": 1}]
)
def test_a_file_with_words_that_are_not_known_is_refused(tmp_path, changes):
    path = sae.save(made(TopK(k=K), torch.float32), tmp_path / "d")
    rewrite(path, **changes)
    with pytest.raises(DictionaryFormatError, match="must describe a dictionary"):
        sae.load(path)


def test_batchtopk_in_training_selects_by_decoder_norm_where_it_gates_by_it():
    dictionary = made(BatchTopK(k=K), gate_by_decoder_norm=True)
    u, norms = dictionary.scaled(rows()), dictionary.dec_rows.norm(dim=1)
    result = to_dense(encode_batch(dictionary.config.activation, u, dictionary.encoder()), D_SAE)
    h = (u - dictionary.b_dec) @ dictionary.enc_rows.T + dictionary.b_enc
    kth = (h * norms).flatten().sort(descending=True).values[K * BATCH - 1]
    torch.testing.assert_close(result, h * (h * norms >= kth))
    assert int((result > 0).sum()) == K * BATCH


def test_gated_is_jumprelu_where_both_biases_and_scales_agree():
    gated, jump = made(Gated()), made(JumpReLU())
    with torch.no_grad():
        jump.enc_rows.copy_(gated.enc_rows)
        jump.dec_rows.copy_(gated.dec_rows)
        jump.b_dec.copy_(gated.b_dec)
        jump.threshold.fill_(0.4)
        jump.b_enc.copy_(gated.b_mag)
        gated.r_mag.zero_()
        gated.b_gate.copy_(gated.b_mag - 0.4)
    torch.testing.assert_close(gated(rows()), jump(rows()))
    assert gated.b_enc is None
    assert "b_enc" not in gated.state_dict()


@pytest.mark.parametrize("activation", [TopK(k=K), ReLU(), JumpReLU()])
def test_a_latent_without_a_direction_is_silent_where_it_gates_by_its_norm(activation):
    dictionary = made(activation, torch.float32, gate_by_decoder_norm=True)
    with torch.no_grad():
        dictionary.dec_rows[4] = 0.0
    assert dictionary.encode_dense(rows(torch.float32))[:, 4].eq(0).all()
    assert dictionary(rows(torch.float32)).isfinite().all()


@pytest.mark.parametrize("norm", ["layer_norm", "rms"])
def test_a_normed_dictionary_follows_the_size_of_a_row_and_survives_a_constant_one(norm):
    dictionary = made(TopK(k=K), input_norm=norm)
    x = rows()
    torch.testing.assert_close(dictionary(x * 100), dictionary(x) * 100, rtol=1e-4, atol=1e-4)
    same = torch.full((1, D_IN), 3.0).double()
    assert dictionary(same).isfinite().all()
    assert dictionary(same * 0).eq(0).all()


@pytest.mark.parametrize("form", [{"skip": True}, {"input_norm": "rms"}])
def test_decode_asks_for_the_rows_that_it_needs(form):
    dictionary = made(TopK(k=K), **form)
    latents = dictionary.encode(rows())
    with pytest.raises(ValueError, match=r"decode must be given the rows x with .*, got none"):
        dictionary.decode(latents)


def test_directions_are_in_the_units_of_the_output():
    dictionary = made(TopK(k=K), d_out=D_OUT, b_in="none", output_scale=1.7)
    torch.testing.assert_close(dictionary.direction(4), dictionary.W_dec[4] / 1.7)
    mean = torch.arange(float(D_OUT))
    initialise(dictionary, torch.Generator().manual_seed(1), mean=mean)
    torch.testing.assert_close(dictionary.decode(torch.zeros(1, D_SAE).double())[0].float(), mean)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_scale": 0.0}, "output_scale must be a positive number, got 0.0"),
        ({"input_norm": "layer_norm", "d_in": 1}, "d_in must be at least 2, got 1"),
        (
            {"gate_by_decoder_norm": True, "activation": Gated()},
            "gate_by_decoder_norm must be false for activation.kind 'gated', got True",
        ),
    ],
)
def test_forms_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as problem:
        SAEConfig(**{"d_in": D_IN, "d_sae": D_SAE, "activation": TopK(k=K), **fields})
    assert str(problem.value).startswith(message.split()[0])
