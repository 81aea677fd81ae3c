import json

import pytest
import torch
from safetensors.torch import save as to_safetensors

import sae
from sae.architecture import ReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder
from sae.pretrained import DictionaryFormatError

D_IN, D_SAE = 7, 23


def dictionary(activation) -> SparseAutoencoder:
    made = SparseAutoencoder(
        SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, input_scale=0.3)
    )
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
        if value is None:
            del record[key]
        else:
            record[key] = value
    file.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_sae": 24}, "sae.safetensors must hold"),
        ({"format_version": 2}, "version 1, got 'monosema' version 2; update monosema"),
        ({"format": "other"}, "format must be 'monosema', got 'other'"),
        ({"b_in": None}, "must have the keys"),
        ({"extra": 1}, "must have the keys"),
        ({"activation": {"kind": "topk", "k": "3"}}, "activation must be a known kind"),
        ({"activation": {"kind": "gelu"}}, "activation must be a known kind"),
        ({"input_scale": -1.0}, "input_scale must be a positive number"),
        ({"d_in": "seven"}, "must describe a dictionary"),
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
    with pytest.raises(DictionaryFormatError, match="must be a whole safetensors file"):
        sae.load(path)
    weights.unlink()
    with pytest.raises(DictionaryFormatError, match=r"must hold sae\.safetensors, got none"):
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
    (tmp_path / "d" / "sae.safetensors").write_bytes(to_safetensors(made.state_dict()))
    with pytest.raises(
        DictionaryFormatError, match="finite float32 numbers, got others in 'b_enc'"
    ):
        sae.load(tmp_path / "d")


def test_other_formats_and_pickles_are_refused(tmp_path):
    sae.save(dictionary(TopK(k=3)), tmp_path / "d")
    with pytest.raises(DictionaryFormatError, match="format must be 'monosema', got 'saelens'"):
        sae.load(tmp_path / "d", format="saelens")
    with pytest.raises(ValueError, match="allow_pt must be False"):
        sae.load(tmp_path / "d", allow_pt=True)
