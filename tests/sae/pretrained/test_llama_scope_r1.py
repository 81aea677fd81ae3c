import numpy as np
import pytest

import sae
from sae.pretrained import DictionaryFormatError, load_with_source

D, F = 5, 20
HOOK = "blocks.15.hook_resid_post"
CONFIG = {
    "d_model": D,
    "expansion_factor": 4,
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "use_decoder_bias": True,
    "hook_point_in": HOOK,
    "hook_point_out": HOOK,
}
NORM = f"dataset_average_activation_norm.{HOOK}"


def arrays(make, d_sae=F):
    shapes = {"encoder.weight": (d_sae, D), "encoder.bias": d_sae, "decoder.weight": (D, d_sae)}
    given = make(**shapes, **{"decoder.bias": D}, log_jumprelu_threshold=d_sae)
    return given | {NORM: np.array(3.1, np.float32)}


def put(peer, path, given, **changes):
    peer.write(path / "config.json", CONFIG | changes)
    peer.tensors(path / "sae_weights.safetensors", given)
    return path


def reference(peer, given, x, *, gate=True, norm=3.1, theta=np.exp):
    w = peer.wide({name: a for name, a in given.items() if not name.startswith("dataset")})
    s = np.sqrt(D) / np.float64(np.float32(norm))
    n = np.linalg.norm(w.decoder_weight, axis=0) if gate else 1.0
    h = (x * s @ w.encoder_weight.T + w.encoder_bias) * n
    acts = peer.jump(h, theta(w.log_jumprelu_threshold)) / n
    return acts, (acts @ w.decoder_weight.T + w.decoder_bias) / s


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("d_sae", [D, F])
def test_the_published_encode(tmp_path, make, peer, rows, agree, gate, d_sae):
    given = arrays(make, d_sae)
    path = put(
        peer, tmp_path, given, expansion_factor=d_sae / D, sparsity_include_decoder_norm=gate
    )
    loaded = load_with_source(path)
    assert loaded.source.source_format == "llama_scope_r1"
    x = rows(D)
    agree(loaded.dictionary, x, *reference(peer, given, x, gate=gate))


@pytest.mark.parametrize("wrong", [{"gate": False}, {"norm": 1.7}, {"theta": np.abs}])
def test_other_readings_are_other_functions(tmp_path, make, peer, rows, agree, wrong):
    given = arrays(make)
    x = rows(D)
    with pytest.raises(AssertionError, match="is off"):
        agree(sae.load(put(peer, tmp_path, given)), x, *reference(peer, given, x, **wrong))


def test_the_other_orientation_is_another_function(tmp_path, make, peer, rows, agree):
    given = arrays(make, D)
    path = put(peer, tmp_path, given, expansion_factor=1)
    x = rows(D)
    for name in ("encoder.weight", "decoder.weight"):
        with pytest.raises(AssertionError, match="is off"):
            agree(sae.load(path), x, *reference(peer, given | {name: given[name].T}, x))


def test_without_its_norm_it_is_refused(tmp_path, make, peer):
    given = arrays(make)
    del given[NORM]
    with pytest.raises(DictionaryFormatError, match="must hold a positive dataset_average"):
        sae.load(put(peer, tmp_path, given))
    with pytest.raises(DictionaryFormatError, match="must have the key 'norm_activation'"):
        sae.load(put(peer, tmp_path, given, norm_activation=None))


def test_unknown_tensors_are_refused(tmp_path, make, peer):
    given = arrays(make)
    for changed in (
        given | {"W_E": given["encoder.weight"].T},
        given | {"x": given["encoder.bias"]},
    ):
        with pytest.raises(DictionaryFormatError, match=r"must hold|readable in one way"):
            sae.load(put(peer, tmp_path, changed))
    flat = given | {"encoder.weight": given["encoder.weight"].ravel()}
    with pytest.raises(DictionaryFormatError, match="the weights as matrices"):
        sae.load(put(peer, tmp_path, flat))
