import json

import numpy as np
import pytest
import torch

import sae
from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU, TopK
from sae.pretrained import DictionaryFormatError, load_with_source, rewrite
from sae.pretrained.export import export

D, F, D_OUT = 7, 23, 11
K = 3


def cfg(architecture, /, **changes):
    record = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.18.0", "hook_name": "blocks.5.hook_resid_post"},
    }
    record |= {"d_out": D_OUT} if "transcoder" in architecture else {}
    record |= {"k": K} if "topk" in architecture else {}
    record |= changes
    return {key: value for key, value in record.items() if value is not ...}


def arrays(make, architecture, d_out=D):
    if architecture == "gated":
        return make(W_enc=(D, F), W_dec=(F, D), b_dec=D, b_gate=F, b_mag=F, r_mag=F)
    made = make(W_enc=(D, F), W_dec=(F, d_out), b_enc=F, b_dec=d_out)
    if "jumprelu" in architecture:
        made |= make(threshold=F)
    if "skip" in architecture:
        made |= make(W_skip=(d_out, D))
    if "batchtopk" in architecture:
        made["topk_threshold"] = np.array(0.7, np.float64)
    return made


def reference(peer, architecture, given, x, *, centred=True, gate=False):
    """The published semantics, norms aside: activations, and output in the same units."""
    w = peer.wide(given)
    is_transcoder = "transcoder" in architecture
    u = x - w.b_dec if centred and not is_transcoder else x
    if architecture == "gated":
        pi = u @ w.W_enc
        acts = (pi + w.b_gate > 0) * peer.relu(pi * np.exp(w.r_mag) + w.b_mag)
        return acts, acts @ w.W_dec + w.b_dec
    h = u @ w.W_enc + w.b_enc
    n = np.linalg.norm(w.W_dec, axis=1) if gate else 1.0
    if architecture == "topk":
        acts = peer.top_k(h * n, K)
    elif "batchtopk" in architecture:
        acts = peer.jump(h * n, w.topk_threshold)
    else:
        acts = peer.jump(h, w.threshold) if "jumprelu" in architecture else peer.relu(h)
    y = acts / n @ w.W_dec + w.b_dec
    return acts, y + (x @ w.W_skip.T if "skip" in architecture else 0)


def put(peer, path, record, given):
    peer.write(path / "cfg.json", record)
    peer.tensors(path / "sae_weights.safetensors", given)
    return path


@pytest.mark.parametrize(
    ("architecture", "activation"),
    [
        ("standard", ReLU()),
        ("topk", TopK(k=K)),
        ("jumprelu", JumpReLU()),
        ("gated", Gated()),
        ("transcoder", ReLU()),
        ("skip_transcoder", ReLU()),
        ("jumprelu_transcoder", JumpReLU()),
        ("jumprelu_skip_transcoder", JumpReLU()),
        ("batchtopk", BatchTopK(k=K)),
        ("matryoshka_batchtopk", BatchTopK(k=K)),
    ],
)
def test_each_architecture_is_what_its_library_computes(
    tmp_path, make, peer, rows, agree, architecture, activation
):
    given = arrays(make, architecture, D_OUT if "transcoder" in architecture else D)
    dictionary = sae.load(put(peer, tmp_path, cfg(architecture), given))
    assert dictionary.config.activation == activation
    x = rows(D)
    agree(dictionary, x, *reference(peer, architecture, given, x))


def test_without_centring(tmp_path, make, peer, rows, agree):
    given = arrays(make, "standard")
    x = rows(D)
    path = put(peer, tmp_path, cfg("standard", apply_b_dec_to_input=False), given)
    agree(sae.load(path), x, *reference(peer, "standard", given, x, centred=False))
    with pytest.raises(AssertionError, match="encode_dense is off"):
        agree(sae.load(path), x, *reference(peer, "standard", given, x, centred=True))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_gating_by_the_decoder_norm(tmp_path, make, peer, rows, agree, monkeypatch, architecture):
    given = arrays(make, architecture)
    record = cfg(architecture, rescale_acts_by_decoder_norm=True)
    loaded = load_with_source(put(peer, tmp_path, record, given))
    x = rows(D)
    wanted = reference(peer, architecture, given, x, gate=True)
    agree(loaded.dictionary, x, *wanted)
    assert "decoder norms" in loaded.source.folds_applied[0]
    monkeypatch.setattr(rewrite, "decoder_norm_gate", lambda weights: weights)
    with pytest.raises(AssertionError, match="encode_dense is off"):
        agree(sae.load(tmp_path), x, *wanted)


@pytest.mark.parametrize("norm", ["constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_skip_transcoder"])
def test_a_transcoder_s_norm_is_not_undone_and_its_skip_reads_rows_as_they_are(
    tmp_path, make, peer, rows, agree, architecture, norm
):
    given = arrays(make, architecture, D_OUT)
    path = put(peer, tmp_path / "a", cfg(architecture, normalize_activations=norm), given)
    x = rows(D) * 5 + 2
    if norm == "layer_norm":
        u = (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True, ddof=1) + 1e-5)
    else:
        u = x * np.sqrt(D) / np.linalg.norm(x, axis=1, keepdims=True)
    acts, y = reference(peer, architecture, given, u)
    w = peer.wide(given)
    y = y + (x - u) @ w.W_skip.T if "skip" in architecture else y
    dictionary = sae.load(path)
    agree(dictionary, x, acts, y)
    again = sae.load(sae.save(dictionary.float(), tmp_path / "b"))
    agree(again, x, acts, y)
    assert again.config == dictionary.config
    export(again.float(), tmp_path / "c", "saelens")
    agree(sae.load(tmp_path / "c"), x, acts, y)
    rows_in = torch.from_numpy(x)
    assert float(dictionary.double().output_norm(rows_in).size) == 1.0


@pytest.mark.parametrize("norm", ["constant_norm_rescale", "layer_norm"])
def test_norms_of_each_token(tmp_path, make, peer, rows, agree, norm):
    given = arrays(make, "topk")
    path = put(peer, tmp_path, cfg("topk", normalize_activations=norm), given)
    x = rows(D) * 5 + 2
    if norm == "layer_norm":
        mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
        acts, y = reference(peer, "topk", given, (x - mean) / (std + 1e-5))
        agree(sae.load(path), x, acts, y * std + mean)
        std = x.std(1, keepdims=True)  # the mutant: n instead of n - 1
        acts, y = reference(peer, "topk", given, (x - mean) / (std + 1e-5))
        with pytest.raises(AssertionError, match="is off"):
            agree(sae.load(path), x, acts, y * std + mean)
    else:
        factor = np.sqrt(D) / np.linalg.norm(x, axis=1, keepdims=True)
        acts, y = reference(peer, "topk", given, x * factor)
        agree(sae.load(path), x, acts, y / factor)


def test_an_average_norm_that_was_never_folded(tmp_path, make, peer, rows, agree):
    given = arrays(make, "jumprelu")
    record = cfg("jumprelu", normalize_activations="expected_average_only_in")
    path = put(peer, tmp_path, record, given)
    with pytest.raises(DictionaryFormatError, match=r"must come with activation_scaler\.json"):
        sae.load(path)
    peer.write(path / "activation_scaler.json", {"scaling_factor": 0.37})
    x = rows(D)
    acts, y = reference(peer, "jumprelu", given, x * 0.37)
    agree(sae.load(path), x, acts, y / 0.37)
    peer.write(path / "cfg.json", cfg("jumprelu"))
    with pytest.raises(DictionaryFormatError, match="must have no factor where"):
        sae.load(path)


LEGACY = {"d_in": D, "d_sae": F, "hook_point": "blocks.5.hook_z", "lr": 0.1, "l1_coefficient": 3}


@pytest.mark.parametrize(
    ("architecture", "record"),
    [
        ("standard", {}),
        ("standard", {"sae_lens_version": "5.4.1", "activation_fn_str": "relu"}),
        ("standard", {"apply_b_dec_to_input": False, "normalize_activations": None}),
        ("topk", {"activation_fn": "topk", "activation_fn_kwargs": {"k": K}}),
        ("topk", {"architecture": "topk", "activation_fn_kwargs": {"k": K}}),
        ("jumprelu", {"architecture": "jumprelu", "normalize_activations": "none"}),
        ("gated", {"architecture": "gated", "normalize_activations": False}),
    ],
)
def test_files_from_before_version_6(tmp_path, make, peer, rows, agree, architecture, record):
    given = arrays(make, architecture)
    factor = {"scaling_factor": np.ones(F, np.float32)}
    loaded = load_with_source(put(peer, tmp_path, LEGACY | record, given | factor))
    x = rows(D)
    centred = record.get("apply_b_dec_to_input", True)
    agree(loaded.dictionary, x, *reference(peer, architecture, given, x, centred=centred))
    assert loaded.source.folds_applied[0] == "scaling_factor of ones dropped"
    assert loaded.source.site["hook_point"] == "blocks.5.hook_z"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"activation_fn": "tanh-relu"}, "activation_fn must be 'relu', or 'topk'"),
        ({"activation_fn": "topk"}, "must have the key 'activation_fn_kwargs'"),
        ({"architecture": "transcoder"}, "before SAELens 6, got 'transcoder'"),
        ({"normalize_activations": True}, "must come with activation_scaler"),
        ({"normalize_activations": "other"}, "normalize_activations must be one of"),
        ({"d_out": 11}, "must have shape"),
    ],
)
def test_older_files_that_are_refused(tmp_path, make, peer, record, message):
    put(peer, tmp_path, LEGACY | record, arrays(make, "standard"))
    with pytest.raises(DictionaryFormatError, match=message):
        sae.load(tmp_path)


def test_a_factor_that_is_not_one_is_refused(tmp_path, make, peer):
    given = arrays(make, "standard") | make(scaling_factor=F)
    with pytest.raises(DictionaryFormatError, match="scaling_factor must be all ones"):
        sae.load(put(peer, tmp_path, LEGACY, given))


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("standard", {"architecture": "temporal"}, "architecture must be one of"),
        ("standard", {"apply_b_dec_to_input": ...}, "must have the key 'apply_b_dec_to_input'"),
        ("standard", {"normalize_activations": ...}, "must have the key 'normalize_activations'"),
        ("standard", {"normalize_activations": "covariance_whitening"}, "must be one of"),
        ("standard", {"d_sae": F + 1}, r"must have shape \(.*24.*\), got \(.*23.*\)"),
        ("standard", {"d_in": D + 1}, "must have shape"),
        ("standard", {"d_in": "7"}, "d_in must be a whole number"),
        ("standard", {"d_in": True}, "d_in must be a whole number"),
        ("standard", {"new_thing": 1}, r"known keys, got \['new_thing'\]"),
        ("topk", {"k": ...}, "must have the key 'k'"),
        ("topk", {"k": F + 1}, "activation.k must be at most d_sae=23"),
        ("topk", {"k": 0}, "k must be a whole number from 1"),
        ("transcoder", {"d_out": ...}, "must have the key 'd_out'"),
        ("jumprelu", {"architecture": "standard"}, r"unknown \['threshold'\]"),
        ("standard", {"architecture": "jumprelu"}, r"missing \['threshold'\]"),
    ],
)
def test_what_is_refused(tmp_path, make, peer, architecture, changes, message):
    given = arrays(make, architecture, D_OUT if architecture == "transcoder" else D)
    put(peer, tmp_path, cfg(architecture, **changes), given)
    with pytest.raises(DictionaryFormatError, match=message):
        sae.load(tmp_path)


def test_a_threshold_that_was_never_estimated_is_refused(tmp_path, make, peer):
    given = arrays(make, "batchtopk") | {"topk_threshold": np.array(0.0)}
    with pytest.raises(DictionaryFormatError, match="topk_threshold must be above 0"):
        sae.load(put(peer, tmp_path, cfg("batchtopk"), given))


def test_the_other_orientation_is_seen(tmp_path, make, peer, rows, agree):
    given = arrays(make, "standard")
    put(peer, tmp_path, cfg("standard"), given | {"W_dec": given["W_dec"].T})
    with pytest.raises(DictionaryFormatError, match="W_dec must have shape"):
        sae.load(tmp_path)
    # where d_in = d_sae the format says it, and the other reading is another function
    given = make(W_enc=(D, D), W_dec=(D, D), b_enc=D, b_dec=D)
    put(peer, tmp_path, cfg("standard", d_sae=D), given)
    x = rows(D)
    agree(sae.load(tmp_path), x, *reference(peer, "standard", given, x))
    for name in ("W_enc", "W_dec"):
        turned = given | {name: given[name].T}
        with pytest.raises(AssertionError, match="is off"):
            agree(sae.load(tmp_path), x, *reference(peer, "standard", turned, x))


def test_the_source_is_told(tmp_path, make, peer):
    loaded = load_with_source(put(peer, tmp_path, cfg("standard"), arrays(make, "standard")))
    source = loaded.source
    assert source.source_format == "saelens"
    assert source.source_path == str(tmp_path)
    assert source.source_sha256.keys() == {"cfg.json", "sae_weights.safetensors"}
    assert source.site == {"hook_name": "blocks.5.hook_resid_post", "reshape_activations": "none"}
    assert json.dumps(source.source_sha256)


def test_a_slice_of_the_latents(tmp_path, make, peer):
    given = arrays(make, "jumprelu")
    part = sae.load(put(peer, tmp_path, cfg("jumprelu"), given), latents=slice(4, 9))
    assert np.array_equal(part.W_dec.numpy(), given["W_dec"][4:9])
    assert np.array_equal(part.W_enc.numpy(), given["W_enc"][:, 4:9])
    assert part.config.d_sae == 5
