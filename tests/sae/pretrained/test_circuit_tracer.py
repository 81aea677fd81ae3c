import numpy as np
import pytest

import sae
from sae.architecture import JumpReLU, ReLU, TopK
from sae.pretrained import DictionaryFormatError, load_with_source

D, F, N, K = 7, 23, 3, 4
THRESHOLD = "activation_function.threshold"


def arrays(make, *, d_sae=F, skip=False, kind="relu"):
    given = make(W_enc=(d_sae, D), W_dec=(d_sae, D), b_enc=d_sae, b_dec=D)
    given |= make(W_skip=(D, D)) if skip else {}
    given |= make(**{THRESHOLD: d_sae}) if kind == "jump" else {}
    return given | ({"k": np.array(K)} if kind == "topk" else {})


def reference(peer, given, x):
    w = peer.wide({n.replace("activation_function.", ""): a for n, a in given.items()})
    h = x @ w.W_enc.T + w.b_enc
    if "k" in given:
        acts = np.zeros_like(h)
        best = np.argsort(-h, axis=1)[:, :K]
        np.put_along_axis(acts, best, np.take_along_axis(h, best, 1), 1)
    else:
        acts = h * (h > w.threshold) if THRESHOLD in given else peer.relu(h)
    return acts, acts @ w.W_dec + w.b_dec + (x @ w.W_skip.T if "W_skip" in given else 0)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("kind", "form"), [("relu", ReLU()), ("jump", JumpReLU())])
def test_one_layer(tmp_path, make, peer, rows, agree, kind, form, skip):
    given = arrays(make, kind=kind, skip=skip)
    peer.tensors(tmp_path / "layer_3.safetensors", given)
    loaded = load_with_source(tmp_path / "layer_3.safetensors")
    assert loaded.dictionary.config.activation == form
    assert loaded.source.site["layer"] == "3"
    x = rows(D)
    agree(loaded.dictionary, x, *reference(peer, given, x))


def test_a_topk_keeps_negative_values_and_must_be_named(tmp_path, make, peer, rows, agree):
    given = arrays(make, kind="topk")
    given["b_enc"] += 9  # so that the k largest are positive, where both are the same
    path = tmp_path / "layer_0.safetensors"
    peer.tensors(path, given)
    with pytest.raises(DictionaryFormatError, match="must cut negative values at 0"):
        sae.load(path)
    x = rows(D)
    dictionary = sae.load(path, format="circuit_tracer")
    assert dictionary.config.activation == TopK(k=K)
    agree(dictionary, x, *reference(peer, given, x))


def test_orientation(tmp_path, make, peer, rows, agree):
    given = arrays(make, d_sae=D, skip=True)
    path = tmp_path / "layer_0.safetensors"
    peer.tensors(path, given)
    with pytest.raises(DictionaryFormatError, match="show its orientation by its shape"):
        sae.load(path)
    x = rows(D)
    dictionary = sae.load(path, format="circuit_tracer")
    agree(dictionary, x, *reference(peer, given, x))
    for name in ("W_enc", "W_dec", "W_skip"):
        with pytest.raises(AssertionError, match="is off"):
            agree(dictionary, x, *reference(peer, given | {name: given[name].T}, x))


def cross(make, peer, path, layer, threshold):
    given = make(W_enc=(F, D), b_enc=F, b_dec=D) | (make(threshold=F) if threshold else {})
    decoder = make(W_dec=(F, N, D))
    peer.tensors(path / f"W_enc_{layer}.safetensors", {f"{n}_{layer}": a for n, a in given.items()})
    peer.tensors(path / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": decoder["W_dec"]})
    return given | decoder


@pytest.mark.parametrize("threshold", [True, False])
def test_one_source_of_a_cross_layer_transcoder(tmp_path, make, peer, rows, agree, threshold):
    given = cross(make, peer, tmp_path, 5, threshold)
    loaded = load_with_source(tmp_path / "W_enc_5.safetensors")
    assert loaded.source.site["output"] == "layers 5 to 7 of 7 side by side"
    assert loaded.source.source_sha256.keys() == {"W_enc_5.safetensors", "W_dec_5.safetensors"}
    w, x = peer.wide(given), rows(D)
    h = x @ w.W_enc.T + w.b_enc
    acts = h * (h > w.threshold) if threshold else peer.relu(h)
    y = np.einsum("nf,ftd->ntd", acts, w.W_dec)
    y[:, 0] += w.b_dec
    agree(loaded.dictionary, x, acts, y.reshape(len(x), -1))
    y[:, 1] += w.b_dec
    with pytest.raises(AssertionError, match="is off"):
        agree(loaded.dictionary, x, acts, y.reshape(len(x), -1))


def test_what_is_refused(tmp_path, make, peer):
    given = arrays(make)
    path = tmp_path / "layer_0.safetensors"
    peer.tensors(path, given)
    with pytest.raises(DictionaryFormatError, match="must be one file"):
        sae.load(tmp_path)
    (tmp_path / "config.yaml").write_text("model: x\nactivation: 'TopK'\n")
    with pytest.raises(DictionaryFormatError, match="must hold k where its config says top-k"):
        sae.load(path)
    (tmp_path / "config.yaml").unlink()
    for changed, message in [
        (given | {"x": given["b_enc"]}, r"unknown \['x'\]"),
        (given | {"W_dec": given["W_dec"].T}, "W_dec must have shape"),
        (arrays(make, kind="jump") | {"k": np.array(3)}, "k must be one number without thresholds"),
        (given | {"W_enc": given["W_enc"].astype(np.int32)}, "floating-point numbers"),
    ]:
        peer.tensors(path, changed)
        with pytest.raises(DictionaryFormatError, match=message):
            sae.load(path)
    cross(make, peer, tmp_path, 1, threshold=False)
    (tmp_path / "W_dec_1.safetensors").unlink()
    with pytest.raises(DictionaryFormatError, match=r"must hold W_dec_1\.safetensors"):
        sae.load(tmp_path / "W_enc_1.safetensors")
