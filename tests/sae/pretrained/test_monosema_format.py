import json

import pytest
import torch
from safetensors.torch import save as to_safetensors

import sae
from activations_cache import seals
from sae.architecture import Gated, JumpReLU, ReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder
from sae.pretrained import DictionaryFormatError

D_IN, D_SAE = 7, 23


DROP = object()


def dictionary(activation) -> SparseAutoencoder:
    return filled(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, input_scale=0.3))


def filled(config) -> SparseAutoencoder:
    made = SparseAutoencoder(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return made


@pytest.mark.parametrize("activation", [ReLU(), TopK(k=3)])
def test_save_then_load_is_bit_equal(tmp_path, activation):
    made = dictionary(activation)
    sae.save(made, tmp_path / "d", {"cache": "abc"})
    back = sae.load(tmp_path / "d")
    assert back.config == made.config
    for name, parameter in made.named_parameters():
        assert torch.equal(dict(back.named_parameters())[name], parameter)
    x = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(1))
    assert torch.equal(back(x), made(x))
    assert json.loads((tmp_path / "d" / "provenance.json").read_text())["cache"] == "abc"


def test_a_slice_of_the_latents_is_read_alone(tmp_path):
    made = dictionary(TopK(k=11))
    sae.save(made, tmp_path / "d")
    part = sae.load(tmp_path / "d", latents=slice(5, 8))
    assert part.config.d_sae == 3
    assert part.config.activation == TopK(k=3)
    assert torch.equal(part.W_dec, made.W_dec[5:8])
    assert torch.equal(part.b_dec, made.b_dec)


def break_config(path, **changes):
    file = path / "config.json"
    record = json.loads(file.read_text())
    for key, value in changes.items():
        if value is DROP:
            del record[key]
        else:
            record[key] = value
    file.write_text(json.dumps(record))
    seals.add(path, [file.name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_sae": 24}, "sae.safetensors must hold"),
        ({"format_version": 2}, "version 1, got 'monosema' version 2; update monosema"),
        ({"format": "other"}, "must be format 'monosema' version 1, got 'other'"),
        ({"b_in": DROP}, "must have the keys"),
        ({"extra": 1}, "must have the keys"),
        ({"activation": {"kind": "topk", "k": "3"}}, "k must be a whole number"),
        ({"activation": {"kind": "topk"}}, "must have the key 'k'"),
        ({"activation": {"kind": "relu", "k": 3}}, r"known keys, got \['k'\]"),
        ({"activation": {"kind": "gelu"}}, "kind must be one of"),
        ({"activation": "topk"}, "activation must be an object"),
        ({"activation": {"kind": "topk", "k": 24}}, "activation.k must be at most d_sae=23"),
        ({"input_scale": -1.0}, "input_scale must be a positive number"),
        ({"d_in": "seven"}, "d_in must be a whole number"),
        ({"d_in": 7.0}, "d_in must be a whole number"),
        ({"d_sae": 10**12}, "d_sae must be a whole number from 1 to"),
        ({"skip": "yes"}, "skip must be true or false"),
        ({"b_in": "other"}, "b_in must be one of"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, changes, message):
    sae.save(dictionary(TopK(k=3)), tmp_path / "d")
    break_config(tmp_path / "d", **changes)
    with pytest.raises(DictionaryFormatError, match=message):
        sae.load(tmp_path / "d")


def test_damage_is_refused_in_one_line(tmp_path):
    path = tmp_path / "d"
    with pytest.raises(FileNotFoundError, match="a dictionary must be at"):
        sae.load(path)
    path.mkdir()
    with pytest.raises(
        DictionaryFormatError, match=r"must be a dictionary directory with config\.json"
    ):
        sae.load(path)
    sae.save(dictionary(TopK(k=3)), path)
    weights = path / "sae.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    with pytest.raises(DictionaryFormatError, match="must have 1,672 bytes, got 1,663; it is dam"):
        sae.load(path)
    (path / seals.LIST).unlink()
    (path / "provenance.json").unlink()
    with pytest.raises(DictionaryFormatError, match="must be a whole safetensors file"):
        sae.load(path)
    weights.unlink()
    with pytest.raises(
        DictionaryFormatError, match=r"must hold sae\.safetensors, got no such file"
    ):
        sae.load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(DictionaryFormatError, match="must be readable JSON"):
        sae.load(path)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    made = dictionary(TopK(k=3))
    sae.save(made, tmp_path / "d")
    with torch.no_grad():
        made.b_enc[4] = float("nan")
    with pytest.raises(ValueError, match="must hold finite numbers to be saved"):
        sae.save(made, tmp_path / "other")
    path = tmp_path / "d"
    (path / "sae.safetensors").write_bytes(to_safetensors(made.state_dict()))
    with pytest.raises(DictionaryFormatError, match="it is damaged: copy it again"):
        sae.load(path)
    seals.add(path, ["sae.safetensors"])
    with pytest.raises(DictionaryFormatError, match=r"must have the sha256 of provenance\.json"):
        sae.load(path)
    (path / "provenance.json").unlink()
    with pytest.raises(DictionaryFormatError, match="b_enc must hold finite numbers"):
        sae.load(tmp_path / "d")


def test_files_from_before_a_field_existed_have_its_default(tmp_path):
    made = dictionary(TopK(k=3))
    sae.save(made, tmp_path / "d")
    break_config(
        tmp_path / "d", output_scale=DROP, input_norm=DROP, gate_by_decoder_norm=DROP, skip=DROP
    )
    assert sae.load(tmp_path / "d").config == made.config


def test_every_form_is_read_back(tmp_path):
    forms = [
        {"activation": Gated(), "b_in": "own", "skip": True},
        {"activation": JumpReLU(), "input_norm": "layer_norm", "gate_by_decoder_norm": True},
        {"activation": ReLU(), "d_out": 11, "b_in": "none", "output_scale": 2.5, "skip": True},
    ]
    for form in forms:
        made = filled(SAEConfig(d_in=D_IN, d_sae=D_SAE, **form))
        back = sae.load(sae.save(made, tmp_path / "d"))
        assert back.config == made.config
        assert back.state_dict().keys() == made.state_dict().keys()
        x = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(1))
        assert torch.equal(back(x), made(x))
        part = sae.load(tmp_path / "d", latents=slice(3, 8))
        assert torch.equal(part.W_dec, made.W_dec[3:8])
        assert part(x).shape == made(x).shape
