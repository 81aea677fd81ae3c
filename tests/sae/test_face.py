"""What a dictionary says of itself, and what it takes."""

import re

import pytest
import torch

from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU, SAEConfig, Slice, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.metrics import Firing
from sae.pretrained import load, save
from sae.train.config import DictionaryConfig
from sae.train.step import TrainStep

D_IN, D_SAE = 7, 23
FORMS = {
    "topk": {"activation": TopK(k=3)},
    "relu": {"activation": ReLU()},
    "jumprelu": {"activation": JumpReLU(), "input_norm": "rms"},
    "gated": {"activation": Gated(), "skip": True},
    "sides": {
        "activation": TopK(k=3),
        "input_norm": "rms",
        "inputs": (Slice(hook_point="a:out", width=3), Slice(hook_point="b:out", width=4)),
    },
}


def dictionary_of(**form) -> SparseAutoencoder:
    made = SparseAutoencoder(SAEConfig(d_in=D_IN, d_sae=D_SAE, **form))
    initialise(made, torch.Generator().manual_seed(1))
    return made.requires_grad_(False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axes", [(), (5,), (3, 5), (2, 3, 5), (0,), (2, 0)])
def test_rows_may_stand_in_any_axes(form, axes):
    made = dictionary_of(**FORMS[form])
    x = torch.randn(*axes, D_IN, generator=torch.Generator().manual_seed(2))
    flat = x.reshape(-1, D_IN)
    latents, rows = made.encode(x), made.encode(flat)
    assert latents.values.shape[:-1] == latents.indices.shape[:-1] == axes
    assert torch.equal(latents.values.reshape(rows.values.shape), rows.values)
    assert torch.equal(made.encode_dense(x).reshape(-1, D_SAE), made.encode_dense(flat))
    x_hat = made(x)
    assert x_hat.shape == x.shape
    assert torch.equal(x_hat.reshape(-1, D_IN), made(flat))
    assert torch.equal(made.decode(latents, x).reshape(-1, D_IN), made.decode(rows, flat))
    assert torch.equal(
        made.decode(made.encode_dense(x), x).reshape(-1, D_IN),
        made.decode(made.encode_dense(flat), flat),
    )


def test_the_largest_latents_of_rows_are_told_once_each():
    made = dictionary_of(activation=TopK(k=3))
    x = torch.randn(2, 5, D_IN, generator=torch.Generator().manual_seed(2))
    peaks = made.encode_dense(x).amax(dim=(0, 1))
    top = made.encode(x).top(4)
    assert top == peaks.argsort(descending=True)[:4].tolist()
    assert set(made.encode(x).top(99)) == set(peaks.nonzero().flatten().tolist())


@pytest.mark.parametrize("method", ["encode", "encode_dense", "decode", "__call__"])
def test_a_width_that_does_not_fit_is_refused_in_any_axes(method):
    made = dictionary_of(activation=TopK(k=3), skip=True)
    wide = torch.zeros(2, 3, D_IN + 1)
    arguments = (torch.zeros(2, 3, D_SAE), wide) if method == "decode" else (wide,)
    with pytest.raises(ValueError, match=r"d_in=7 wide, got"):
        getattr(made, method)(*arguments)


@pytest.mark.parametrize("activation", [TopK(k=3), BatchTopK(k=3), JumpReLU(), Gated()])
def test_repr_says_what_it_is(activation):
    config = SAEConfig(d_in=D_IN, d_sae=D_SAE, d_out=5, activation=activation, b_in="none")
    text = repr(SparseAutoencoder(config).at("h.0.mlp:in", "h.0.mlp:out"))
    for part in (repr(activation), "d_in=7", "d_sae=23", "d_out=5", "h.0.mlp:in", "h.0.mlp:out"):
        assert part in text
    assert "\n" not in text


def test_it_carries_its_hook_point_statistics_and_provenance(tmp_path):
    made = dictionary_of(activation=TopK(k=3)).at("h.1:out")
    path = save(made, tmp_path / "a", {"cache": "abc", "model": {"path": "m"}})
    again = load(str(path))
    assert (again.hook_point, again.stats) == ("h.1:out", None)
    assert again.provenance["cache"] == "abc"
    assert again.provenance["model"] == {"path": "m"}
    counted = Firing(D_SAE)
    counted.update(made.encode(torch.randn(31, D_IN)))
    counted.save(path)  # as `sae evaluate` does; what is loaded already sees it
    assert again.stats is not None
    assert torch.equal(again.stats.max_activation, counted.max_activation)
    assert load(path, latents=slice(0, 5)).stats is None
    assert load(save(again, tmp_path / "b")).provenance["cache"] == "abc"


def test_a_hook_point_is_compared_once_it_is_known():
    made = dictionary_of(activation=TopK(k=3))
    with pytest.raises(ValueError, match=re.escape('got none; say which by .at("model')):
        _ = made.hook_point
    assert made.at("h.1:out") is made
    assert made.at("h.1:out") is made
    with pytest.raises(ValueError, match=r"must be h.1:out, where it was trained, got h.2:out"):
        made.at("h.2:out")
    with pytest.raises(ValueError, match=r"one hook point, got a:out, b:out; use hook_points"):
        _ = dictionary_of(**FORMS["sides"]).hook_point


def test_statistics_of_another_size_are_refused():
    with pytest.raises(ValueError, match="d_sae=23, got 19"):
        dictionary_of(activation=TopK(k=3)).stats = Firing(19)


def test_what_was_not_initialised_does_not_train():
    config = DictionaryConfig(d_sae=D_SAE, activation=TopK(k=3))
    made = SparseAutoencoder(config.architecture(D_IN))
    with pytest.raises(ValueError, match=r"autoencoder must .* all 0.*initialise.*sae\.load"):
        TrainStep(made, config, 11)
    initialise(made, torch.Generator().manual_seed(1))
    assert float(TrainStep(made, config, 11)(torch.randn(31, D_IN)).grad_norm) > 0
