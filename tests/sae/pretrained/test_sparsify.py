import numpy as np
import pytest

import sae
from sae.architecture import GroupMax, TopK
from sae.pretrained import DictionaryFormatError, load_with_source
from sae.pretrained.loading import load_readings

D, F, K = 5, 20, 3
CONFIG = {"d_in": D, "k": K, "num_latents": 0, "expansion_factor": 4, "normalize_decoder": True}


def arrays(make, d_sae=F, skip=False):
    shapes = {"encoder.weight": (d_sae, D), "encoder.bias": d_sae, "W_dec": (d_sae, D), "b_dec": D}
    return make(**shapes, **({"W_skip": (D, D)} if skip else {}))


def reference(peer, given, x, transcode=False):
    w = peer.wide(given)
    u = x if transcode else x - w.b_dec
    acts = peer.top_k(peer.relu(u @ w.encoder_weight.T + w.encoder_bias), K)
    y = acts @ w.W_dec + w.b_dec
    return acts, y + (x @ w.W_skip.T if "W_skip" in given else 0)


def put(peer, path, given, **changes):
    peer.write(path / "cfg.json", {k: v for k, v in (CONFIG | changes).items() if v is not None})
    peer.tensors(path / "sae.safetensors", given)
    return path


@pytest.mark.parametrize("d_sae", [D, F])
def test_an_autoencoder(tmp_path, make, peer, rows, agree, d_sae):
    given = arrays(make, d_sae)
    loaded = load_with_source(put(peer, tmp_path / "layers.3", given, num_latents=d_sae))
    assert loaded.dictionary.config.activation == TopK(k=K)
    assert loaded.source.site == {"hook_point": "layers.3 of the base model"}
    x = rows(D)
    agree(loaded.dictionary, x, *reference(peer, given, x))


@pytest.mark.parametrize("num_latents", [0, None])
def test_the_number_of_latents_follows_from_the_expansion(tmp_path, make, peer, num_latents):
    path = put(peer, tmp_path, arrays(make), num_latents=num_latents)
    assert sae.load(path).config.d_sae == F


@pytest.mark.parametrize("skip", [True, False])
def test_a_transcoder_is_not_centred(tmp_path, make, peer, rows, agree, skip):
    given = arrays(make, skip=skip)
    path = put(peer, tmp_path, given, transcode=True, skip_connection=skip, activation="topk")
    x = rows(D)
    agree(sae.load(path), x, *reference(peer, given, x, transcode=True))
    with pytest.raises(AssertionError, match="is off"):
        agree(sae.load(path), x, *reference(peer, given, x, transcode=False))


def test_of_each_group_of_neighbours_the_largest_fires(tmp_path, make, peer, rows, agree):
    given, x = arrays(make, 2 * K), rows(D)
    path = put(peer, tmp_path, given, num_latents=2 * K, activation="groupmax")
    assert sae.load(path).config.activation == GroupMax(k=K)
    w = peer.wide(given)
    pre = peer.relu((x - w.b_dec) @ w.encoder_weight.T + w.encoder_bias).reshape(len(x), K, 2)
    acts = (pre * (pre == pre.max(axis=2, keepdims=True))).reshape(len(x), 2 * K)
    agree(sae.load(path), x, acts, acts @ w.W_dec + w.b_dec)


def test_a_skip_that_does_not_say_transcode_has_two_readings(tmp_path, make, peer, rows, agree):
    given, x = arrays(make, skip=True), rows(D)
    path = put(peer, tmp_path, given, skip_connection=True)
    agree(sae.load(path, format="sparsify"), x, *reference(peer, given, x))
    result = load_readings(path).dictionaries
    assert list(result) == ["centred by b_dec", "not centred"]
    agree(result["centred by b_dec"], x, *reference(peer, given, x))
    agree(result["not centred"], x, *reference(peer, given, x, transcode=True))
    put(peer, tmp_path, given, skip_connection=True, transcode=True)
    assert list(load_readings(path).dictionaries) == ["as loaded"]


def test_the_other_orientation_is_another_function(tmp_path, make, peer, rows, agree):
    given = arrays(make, D, skip=True)
    path = put(peer, tmp_path, given, num_latents=D, skip_connection=True, transcode=False)
    x = rows(D)
    agree(sae.load(path), x, *reference(peer, given, x))
    for name in ("encoder.weight", "W_dec", "W_skip"):
        with pytest.raises(AssertionError, match="is off"):
            agree(sae.load(path), x, *reference(peer, given | {name: given[name].T}, x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "groupmax"}, "activation.k must divide d_sae=20 into equal groups, got 3"),
        ({"signed": True}, "signed must be false"),
        ({"d_in": None}, "must have the key 'd_in'"),
        ({"k": None}, "must have the key 'k'"),
        ({"k": F + 1}, "activation.k must be at most"),
        ({"expansion_factor": None}, "must have the key 'expansion_factor'"),
        ({"expansion_factor": 3}, "must have shape"),
        ({"skip_connection": True, "transcode": True}, r"missing \['W_skip'\]"),
        ({"skip_connection": True}, "must say transcode where skip_connection is true"),
        ({"other": 1}, "known keys"),
        ({"transcode": "yes"}, "transcode must be true or false"),
    ],
)
def test_configs_that_are_refused(tmp_path, make, peer, changes, message):
    with pytest.raises(DictionaryFormatError, match=message):
        sae.load(put(peer, tmp_path, arrays(make), **changes))


def test_tensors_that_are_refused(tmp_path, make, peer):
    given = arrays(make)
    without = {n: a for n, a in given.items() if n != "W_dec"}
    for changed, message in [
        (without, r"missing \['W_dec'\]"),
        (without | {"decoder.weight": given["W_dec"]}, r"unknown \['decoder.weight'\]"),
        (given | {"W_dec": given["W_dec"].T}, "W_dec must have shape"),
        (given | {"b_dec": np.full(D, np.inf, np.float32)}, "b_dec must hold finite"),
    ]:
        with pytest.raises(DictionaryFormatError, match=message):
            sae.load(put(peer, tmp_path, changed))
