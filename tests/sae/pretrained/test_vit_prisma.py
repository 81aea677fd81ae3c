import numpy as np
import pytest

import sae
from sae.architecture import Gated, ReLU, TopK
from sae.pretrained import DictionaryFormatError, load_with_source

D, F, D_OUT, K = 7, 21, 11, 4
pytestmark = pytest.mark.usefixtures("pickles_here")
CONFIG = {
    "model_name": "open-clip:laion/CLIP-ViT-B-32",
    "hook_point_layer": 9,
    "layer_subtype": "hook_resid_post",
    "d_in": D,
    "expansion_factor": 3,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "normalize_activations": "none",
    "architecture": "standard",
    "is_transcoder": False,
    "cls_token_only": False,
    "dtype": {"__type__": "torch.dtype", "value": "torch.float32"},
}
TRANSCODER = {"is_transcoder": True, "transcoder_with_skip_connection": True, "d_out": D_OUT}


def arrays(make, kind="standard", d_out=D):
    given = make(W_enc=(D, F), W_dec=(F, d_out), b_enc=F, b_dec=D)
    given |= make(b_gate=F, r_mag=F, b_mag=F) if kind == "gated" else {}
    return given | (make(b_dec_out=d_out) if kind == "transcoder" else {})


def put(peer, path, given, **changes):
    peer.write(path / "config.json", CONFIG | changes)
    peer.pt(path / "weights.pt", given)
    return path


def normed(x, norm):
    if norm == "layer_norm":
        mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
        return (x - mean) / (std + 1e-5), std, mean
    if norm == "constant_norm_rescale":
        size = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(D)
        return x / size, size, 0.0
    return x, 1.0, 0.0


def reference(peer, given, x, *, norm="none", k=None, centre_first=False):
    w = peer.wide(given)
    x = x - w.b_dec if centre_first else x
    u, size, mean = normed(x, norm)
    u = u if centre_first else u - w.b_dec
    if "b_gate" in given:
        z = u @ w.W_enc
        acts = (z + w.b_gate > 0) * peer.relu(u @ (w.W_enc * np.exp(w.r_mag)) + w.b_mag)
    else:
        h = u @ w.W_enc + w.b_enc
        acts = peer.top_k(h, k) if k else peer.relu(h)
    y = acts @ w.W_dec + (w.b_dec_out if "b_dec_out" in given else w.b_dec)
    y = y + (x @ w.W_skip.T if "W_skip" in given else 0)
    return acts, y * size + mean


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", ["relu", "topk", "gated"])
def test_autoencoders(tmp_path, make, peer, rows, agree, kind, norm):
    given = arrays(make, kind)
    changes = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    changes = changes if kind == "topk" else {}
    changes |= {"architecture": "gated"} if kind == "gated" else {}
    path = put(peer, tmp_path, given, normalize_activations=norm, **changes)
    loaded = load_with_source(path, allow_pt=True)
    assert loaded.source.source_format == "vit_prisma"
    form = {"relu": ReLU(), "topk": TopK(k=K), "gated": Gated()}[kind]
    assert loaded.dictionary.config.activation == form
    x, k = rows(D) * 3 + 1, K if kind == "topk" else None
    agree(loaded.dictionary, x, *reference(peer, given, x, norm=norm, k=k))
    if norm != "none":  # the bias is subtracted after the norm
        wrong = reference(peer, given, x, norm=norm, k=k, centre_first=True)
        with pytest.raises(AssertionError, match="is off"):
            agree(loaded.dictionary, x, *wrong)


@pytest.mark.parametrize("skip", [True, False])
def test_transcoders(tmp_path, make, peer, rows, agree, skip):
    d_out = D if skip else D_OUT
    given = arrays(make, "transcoder", d_out) | (make(W_skip=(D, D)) if skip else {})
    changes = TRANSCODER | {"transcoder_with_skip_connection": skip, "d_out": d_out}
    path = put(peer, tmp_path, given, **changes)
    x = rows(D)
    agree(sae.load(path, allow_pt=True), x, *reference(peer, given, x))
    if skip:
        turned = given | {"W_skip": given["W_skip"].T}
        with pytest.raises(AssertionError, match="is off"):
            agree(sae.load(path, allow_pt=True), x, *reference(peer, turned, x))
        put(peer, tmp_path, given, **changes, normalize_activations="layer_norm")
        with pytest.raises(DictionaryFormatError, match="must be 'none' where there is a skip"):
            sae.load(path, allow_pt=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn_str must be one of"),
        ({"activation_fn_str": "topk"}, "must have the key 'k'"),
        ({"architecture": "jumprelu"}, "architecture must be one of"),
        ({"architecture": "gated"}, "missing"),
        ({"expansion_factor": 2}, "must have shape"),
        ({"d_in": None}, "must have the key 'd_in'"),
    ],
)
def test_what_is_refused(tmp_path, make, peer, changes, message):
    with pytest.raises(DictionaryFormatError, match=message):
        sae.load(put(peer, tmp_path, arrays(make), **changes), allow_pt=True)


def test_it_is_refused_unless_allowed(tmp_path, make, peer):
    with pytest.raises(DictionaryFormatError, match="pass allow_pt=True"):
        sae.load(put(peer, tmp_path, arrays(make)))
