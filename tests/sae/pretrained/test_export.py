"""What is written for another library is the same function, read by the reader of its format."""

import json

import numpy as np
import pytest
import torch

import sae
from sae.architecture import BatchTopK, Gated, GroupMax, JumpReLU, ReLU, SAEConfig, Slice, TopK
from sae.autoencoder import SparseAutoencoder
from sae.pretrained import DictionaryFormatError, export, rewrite
from sae.pretrained.export import TARGETS

D, F, D_OUT, K = 7, 23, 11, 3
GROUPS = 1  # a divisor of the number of latents, which is prime
PEERS = ("relu", "topk", "batchtopk", "jumprelu", "gated")
pytestmark = pytest.mark.usefixtures("pickles_here")
KINDS = {
    "relu": ReLU(), "topk": TopK(k=K), "batchtopk": BatchTopK(k=K), "jumprelu": JumpReLU(),
    "gated": Gated(), "groupmax": GroupMax(k=GROUPS),
}  # fmt: skip


def filled(kind="relu", *, unit=False, **form):
    """A dictionary of random weights; thresholds that some rows pass."""
    made = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, activation=KINDS[kind], **form))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if made.threshold is not None:
            made.threshold.copy_(torch.rand(made.threshold.shape, generator=generator) + 0.5)
        if unit:
            made.dec_rows /= made.dec_rows.norm(dim=1, keepdim=True)
    return made


def rows():
    return torch.from_numpy(np.random.default_rng(3).standard_normal((29, D)) * 2 + 1)


def results(dictionary):
    with torch.no_grad():
        wide = dictionary.double()
        return wide.encode_dense(rows()), wide(rows())


def differs(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


def same_function(one, other, latents_too=True):
    acts, x_hat = results(one)
    other_acts, other_x_hat = results(other)
    assert differs(other_x_hat, x_hat) < 1e-6
    assert not latents_too or differs(other_acts, acts) < 1e-6


EXACT = [
    *(("saelens", kind, {}) for kind in PEERS),
    *(("saelens", kind, {"b_in": "none"}) for kind in PEERS),
    *(("saelens", kind, {"input_norm": "layer_norm"}) for kind in PEERS),
    ("saelens", "topk", {"input_norm": "rms"}),
    ("saelens", "relu", {"b_in": "none", "d_out": D_OUT, "skip": True}),
    ("saelens", "jumprelu", {"b_in": "none", "d_out": D_OUT}),
    ("saelens", "relu", {"b_in": "none", "input_norm": "layer_norm", "undo_norm": False}),
    ("saelens", "jumprelu", {"b_in": "none", "skip": True}),
    ("sparsify", "topk", {}),
    ("sparsify", "topk", {"b_in": "none", "skip": True}),
    ("sparsify", "groupmax", {}),
    ("dictionary_learning", "relu", {}),
    ("dictionary_learning", "relu", {"b_in": "none"}),
    ("dictionary_learning", "topk", {}),
    ("dictionary_learning", "batchtopk", {}),
    ("dictionary_learning", "jumprelu", {"b_in": "none"}),
    ("dictionary_learning", "gated", {}),
    *(("saebench", kind, {"unit": True}) for kind in PEERS),
]


@pytest.mark.parametrize(("to", "kind", "form"), EXACT)
def test_what_a_format_can_express_is_written_bit_by_bit(tmp_path, to, kind, form):
    made = filled(kind, **form)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    done = export.export(made, tmp_path, to).folds
    assert all("batch's top-k" in fold for fold in done)
    back = sae.load(tmp_path, allow_pt=True)
    assert back.config.b_in == made.config.b_in
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, before[name].expand_as(tensor)), name
    same_function(made, back)


FOLDED = [
    ("saelens", "jumprelu", {"input_scale": 0.3}, True),
    ("saelens", "gated", {"input_scale": 0.3, "output_scale": 1.9}, True),
    ("saelens", "relu", {"b_in": "own"}, True),
    ("saelens", "gated", {"b_in": "own"}, True),
    ("saelens", "relu", {"skip": True, "input_scale": 0.3, "output_scale": 1.9}, True),
    ("saelens", "relu", {"gate_by_decoder_norm": True}, True),
    ("saelens", "jumprelu", {"gate_by_decoder_norm": True}, True),
    ("saelens", "topk", {"gate_by_decoder_norm": True}, False),
    ("saelens", "batchtopk", {"gate_by_decoder_norm": True}, False),
    ("saelens", "topk", {"input_norm": "rms", "input_scale": 0.3}, True),
    ("sparsify", "topk", {"b_in": "own", "input_scale": 0.3}, True),
    ("dictionary_learning", "topk", {"b_in": "none"}, True),
    ("dictionary_learning", "jumprelu", {}, True),
    ("dictionary_learning", "gated", {"b_in": "none"}, True),
    ("dictionary_learning", "batchtopk", {"b_in": "own", "input_scale": 0.3}, True),
    ("saebench", "relu", {}, False),
    ("saebench", "jumprelu", {"input_scale": 0.3}, False),
    ("saebench", "gated", {}, False),
    ("saebench", "batchtopk", {}, False),
    ("saebench", "topk", {"gate_by_decoder_norm": True}, False),
    ("saebench", "topk", {"unit": True, "input_scale": 0.3}, False),
    ("saebench", "topk", {"unit": True, "input_scale": 0.3, "output_scale": 1.9}, False),
]


@pytest.mark.parametrize(("to", "kind", "form", "keeps_latents"), FOLDED)
def test_what_has_to_be_folded_is_the_same_function(tmp_path, to, kind, form, keeps_latents):
    made = filled(kind, **form)
    done = export.export(made, tmp_path, to).folds
    assert done
    assert any("latents are larger" in fold for fold in done) is not keeps_latents
    back = sae.load(tmp_path, allow_pt=True)
    same_function(made, back, latents_too=keeps_latents)
    if to == "saebench":
        assert torch.allclose(back.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64))


@pytest.mark.parametrize(
    ("to", "kind", "form", "message"),
    [
        ("saelens", "topk", {"skip": True}, "must be of ReLU or JumpReLU, its output"),
        ("saelens", "gated", {"b_in": "none", "d_out": D_OUT}, "must be of ReLU or JumpReLU"),
        ("saelens", "relu", {"input_norm": "rms", "skip": True}, "not brought back by a norm"),
        ("sparsify", "relu", {}, "must be one of .*topk.* to be written as sparsify, got 'relu'"),
        ("sparsify", "batchtopk", {}, "to be written as sparsify, got 'batchtopk'"),
        ("saelens", "groupmax", {}, "to be written as saelens, got 'groupmax'"),
        ("dictionary_learning", "groupmax", {}, "got 'groupmax'"),
        ("sparsify", "topk", {"input_norm": "rms"}, "got input_norm='rms'"),
        ("sparsify", "topk", {"b_in": "none", "d_out": D_OUT}, "got d_out=11, d_in=7"),
        ("dictionary_learning", "relu", {"skip": True}, "got skip=True"),
        ("dictionary_learning", "topk", {"input_norm": "layer_norm"}, "got input_norm="),
        ("saebench", "topk", {}, "decoder rows must have one norm for a top-k"),
        ("saebench", "relu", {"b_in": "none", "d_out": D_OUT}, "got a transcoder"),
        ("other", "relu", {}, "the format must be one of"),
    ],
)
def test_what_a_format_cannot_express_is_refused(tmp_path, to, kind, form, message):
    with pytest.raises(DictionaryFormatError, match=message) as caught:
        export.export(filled(kind, **form), tmp_path / "x", to)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_several_hook_points_are_refused_and_one_s_scale_is_folded(tmp_path):
    parts = (Slice(hook_point="a:out", width=3), Slice(hook_point="b:out", width=4))
    with pytest.raises(DictionaryFormatError, match=r"one hook point each .*'b:out'"):
        export.export(filled(inputs=parts), tmp_path, "saelens")
    made = filled(inputs=(Slice(hook_point="a:out", width=D, scale=0.3),))
    assert export.export(made, tmp_path, "saelens").folds
    same_function(made, sae.load(tmp_path))


def test_thresholds_below_0_and_never_estimated_ones_are_refused(tmp_path):
    made = filled("jumprelu", b_in="none")
    with torch.no_grad():
        made.threshold[4] = -0.5
    for to in ("saelens", "dictionary_learning"):
        with pytest.raises(DictionaryFormatError, match=r"thresholds must be at least 0.*got -0.5"):
            export.export(made, tmp_path, to)
    untrained = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, activation=BatchTopK(k=K)))
    with pytest.raises(DictionaryFormatError, match="must hold finite numbers"):
        export.export(untrained, tmp_path, "saelens")


def test_a_wrong_fold_is_seen(tmp_path, monkeypatch):
    """Each step left out, or done by the neighbouring rule, gives another function."""
    cases = {
        "without_scales": ("saelens", filled("jumprelu", input_scale=0.3)),
        "without_gate": ("saelens", filled("topk", gate_by_decoder_norm=True)),
        "centred_by": ("dictionary_learning", filled("topk", b_in="none")),
    }
    for name, (to, made) in cases.items():
        with monkeypatch.context() as patch:
            module = export if name == "centred_by" else rewrite
            patch.setattr(module, name, lambda given, *_: given)
            export.export(made, tmp_path / name, to)
        back = sae.load(tmp_path / name, allow_pt=True)
        assert differs(results(back)[1], results(made)[1]) > 0.01, name


def test_what_is_known_of_the_site_is_written(tmp_path):
    site = {"model_name": "gpt2", "hook_name": "blocks.5.hook_resid_post", "other": "x"}
    export.export(filled(), tmp_path, "saelens", site)
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.5.hook_resid_post"
    assert "other" not in metadata
    assert set(TARGETS) == {
        "saelens", "sparsify", "dictionary_learning", "saebench", "circuit_tracer",
    }  # fmt: skip


TRAINED = {
    "hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out",
    "model_name": "meta-llama/Llama-3.2-1B", "context_size": "256", "training_tokens": "4096",
    "model_dtype": "bfloat16",
}  # fmt: skip


def test_saelens_is_told_model_place_and_training(tmp_path):
    export.export(filled("jumprelu", b_in="none"), tmp_path, "saelens", TRAINED)
    record = json.loads((tmp_path / "cfg.json").read_text())
    metadata = record["metadata"]
    assert record["architecture"] == "jumprelu_transcoder"
    assert metadata["model_name"] == "meta-llama/Llama-3.2-1B"
    assert (metadata["context_size"], metadata["training_tokens"]) == (256, 4096)
    assert metadata["model_from_pretrained_kwargs"] == {"dtype": "bfloat16"}
    read = sae.load(tmp_path).config
    assert read.inputs[0].hook_point == "model.layers.3.mlp:in"
    assert read.outputs[0].hook_point == "model.layers.3.mlp:out"


@pytest.mark.parametrize(
    ("kind", "form"),
    [("relu", {}), ("jumprelu", {"skip": True}), ("batchtopk", {}), ("relu", {"b_in": "b_dec"})],
)
def test_a_transcoder_in_circuit_tracer_s_layout(tmp_path, kind, form):
    dictionary = filled(kind, **{"b_in": "none"} | form)
    export.export(dictionary, tmp_path, "circuit_tracer", TRAINED)
    settings = (tmp_path / "config.yaml").read_text().splitlines()
    assert 'model_kind: "transcoder_set"' in settings
    assert 'feature_input_hook: "mlp.hook_in"' in settings
    assert 'feature_output_hook: "hook_mlp_out"' in settings
    read = sae.load(tmp_path / "layer_3.safetensors", format="circuit_tracer")
    same_function(read, dictionary)


@pytest.mark.parametrize(
    ("kind", "site", "message"),
    [
        ("relu", {}, "got 'none' and 'none'"),
        ("relu", TRAINED | {"hook_name_out": "blocks.4.hook_mlp_out"}, "in one block"),
        ("gated", TRAINED, "must be one of"),
        ("topk", TRAINED, "must be one of .'relu', 'jumprelu'. to be written as circuit_tracer"),
    ],
)
def test_what_circuit_tracer_has_no_form_for(tmp_path, kind, site, message):
    with pytest.raises(DictionaryFormatError, match=message):
        export.export(filled(kind, b_in="none"), tmp_path, "circuit_tracer", site)
    assert not list(tmp_path.iterdir())
