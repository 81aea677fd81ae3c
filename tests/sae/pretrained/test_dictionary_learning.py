import numpy as np
import pytest

import sae
from sae.architecture import TopK
from sae.pretrained import DictionaryFormatError, load_with_source

D, F, K = 7, 23, 3
pytestmark = pytest.mark.usefixtures("pickles_here")

LINEAR = {"encoder.weight": (F, D), "decoder.weight": (D, F)}
PLAIN = {"W_enc": (D, F), "b_enc": F, "W_dec": (F, D), "b_dec": D}
KEYS = {
    "AutoEncoder": LINEAR | {"encoder.bias": F, "bias": D},
    "AutoEncoderNew": LINEAR | {"encoder.bias": F, "decoder.bias": D},
    "GatedAutoEncoder": LINEAR | {"decoder_bias": D, "r_mag": F, "gate_bias": F, "mag_bias": F},
    "JumpReluAutoEncoder": PLAIN | {"threshold": F},
    "AutoEncoderTopK": LINEAR | {"encoder.bias": F, "b_dec": D},
    "BatchTopKSAE": LINEAR | {"encoder.bias": F, "b_dec": D},
    "MatryoshkaBatchTopKSAE": PLAIN,
}
HAVE_K = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")


def arrays(make, kind):
    given = make(**KEYS[kind])
    if kind in HAVE_K:
        given |= {"k": np.array(K, np.int32), "threshold": np.array(0.6, np.float32)}
    if kind.startswith("Matryoshka"):
        given["group_sizes"] = np.array([5, 6, 12])
    return given


def put(peer, path, kind, given, **changes):
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 3, "k": K}
    record = {"trainer": trainer | changes, "buffer": {"io": "out", "ctx_len": 128}}
    peer.write(path / "config.json", record)
    peer.pt(path / "ae.pt", given)
    return path


def reference(peer, kind, given, x):
    w = peer.wide(given)
    if kind == "AutoEncoder":
        acts = peer.relu((x - w.bias) @ w.encoder_weight.T + w.encoder_bias)
        return acts, acts @ w.decoder_weight.T + w.bias
    if kind == "AutoEncoderNew":
        acts = peer.relu(x @ w.encoder_weight.T + w.encoder_bias)
        return acts, acts @ w.decoder_weight.T + w.decoder_bias
    if kind == "GatedAutoEncoder":
        z = (x - w.decoder_bias) @ w.encoder_weight.T
        acts = (z + w.gate_bias > 0) * peer.relu(np.exp(w.r_mag) * z + w.mag_bias)
        return acts, acts @ w.decoder_weight.T + w.decoder_bias
    if kind == "JumpReluAutoEncoder":
        acts = peer.jump(x @ w.W_enc + w.b_enc, w.threshold)
        return acts, acts @ w.W_dec + w.b_dec
    if kind == "MatryoshkaBatchTopKSAE":
        acts = peer.jump((x - w.b_dec) @ w.W_enc + w.b_enc, w.threshold)
        return acts, acts @ w.W_dec + w.b_dec
    h = (x - w.b_dec) @ w.encoder_weight.T + w.encoder_bias
    acts = peer.top_k(h, K) if kind == "AutoEncoderTopK" else peer.jump(h, w.threshold)
    return acts, acts @ w.decoder_weight.T + w.b_dec


@pytest.mark.parametrize("kind", KEYS)
def test_each_class(tmp_path, make, peer, rows, agree, kind):
    given = arrays(make, kind)
    loaded = load_with_source(put(peer, tmp_path, kind, given), allow_pt=True)
    assert loaded.source.site == {
        "dict_class": kind, "layer": "3", "io": "out", "ctx_len": "128",
    }  # fmt: skip
    x = rows(D)
    agree(loaded.dictionary, x, *reference(peer, kind, given, x))


def test_a_class_of_the_wrong_name_is_told_by_its_keys(tmp_path, make, peer, rows, agree):
    given = arrays(make, "AutoEncoderNew")
    path = put(peer, tmp_path, "AutoEncoder", given)
    x = rows(D)
    dictionary = sae.load(path, allow_pt=True)
    assert dictionary.config.b_in == "none"
    agree(dictionary, x, *reference(peer, "AutoEncoderNew", given, x))


def test_an_older_topk_has_k_in_its_config_alone(tmp_path, make, peer, rows, agree):
    given = make(**KEYS["AutoEncoderTopK"])
    path = put(peer, tmp_path, "AutoEncoderTopK", given)
    x = rows(D)
    dictionary = sae.load(path, allow_pt=True)
    assert dictionary.config.activation == TopK(k=K)
    agree(dictionary, x, *reference(peer, "AutoEncoderTopK", given, x))


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_never_estimated_is_refused(tmp_path, make, peer, kind):
    given = arrays(make, kind) | {"threshold": np.array(-1, np.float32)}
    with pytest.raises(DictionaryFormatError, match="threshold must be at least 0"):
        sae.load(put(peer, tmp_path, kind, given), allow_pt=True)
    del given["threshold"]
    with pytest.raises(DictionaryFormatError, match=r"missing \['threshold'\]"):
        sae.load(put(peer, tmp_path, kind, given), allow_pt=True)


def test_a_backup_is_refused(tmp_path, make, peer):
    backup = {"step": 7, "norm_factor": 2.5, "ae": arrays(make, "BatchTopKSAE"), "optimizer": {}}
    with pytest.raises(DictionaryFormatError, match="a backup of an unfinished run"):
        sae.load(put(peer, tmp_path, "BatchTopKSAE", backup), allow_pt=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dict_class": "CrossCoder"}, "dict_class must be one of"),
        ({"dict_class": None}, "must have the key 'dict_class'"),
        ({"k": K + 1}, "k must be the same in both files, got 4 and 3"),
        ({"dict_size": F + 1}, "must have"),
        ({"activation_dim": D + 1}, "must have shape"),
    ],
)
def test_configs_that_are_refused(tmp_path, make, peer, changes, message):
    path = put(peer, tmp_path, "BatchTopKSAE", arrays(make, "BatchTopKSAE"), **changes)
    with pytest.raises(DictionaryFormatError, match=message):
        sae.load(path, allow_pt=True)


def test_groups_that_do_not_cover_the_latents_are_refused(tmp_path, make, peer):
    kind = "MatryoshkaBatchTopKSAE"
    given = arrays(make, kind) | {"group_sizes": np.array([5, 6])}
    with pytest.raises(DictionaryFormatError, match="group_sizes must sum to dict_size=23"):
        sae.load(put(peer, tmp_path, kind, given), allow_pt=True)


def test_the_other_orientation_is_another_function(tmp_path, make, peer, rows, agree):
    kind = "AutoEncoder"
    given = make(**{n: (D, D) if np.ndim(s) else D for n, s in KEYS[kind].items()})
    path = put(peer, tmp_path, kind, given, dict_size=D)
    x = rows(D)
    dictionary = sae.load(path, allow_pt=True)
    agree(dictionary, x, *reference(peer, kind, given, x))
    for name in ("encoder.weight", "decoder.weight"):
        with pytest.raises(AssertionError, match="is off"):
            agree(dictionary, x, *reference(peer, kind, given | {name: given[name].T}, x))


def test_it_is_refused_unless_allowed(tmp_path, make, peer):
    path = put(peer, tmp_path, "AutoEncoder", arrays(make, "AutoEncoder"))
    with pytest.raises(DictionaryFormatError, match=r"pass allow_pt=True") as caught:
        sae.load(path)
    assert "\n" not in str(caught.value)
