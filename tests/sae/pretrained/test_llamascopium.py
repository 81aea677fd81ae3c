import numpy as np
import pytest

import sae
from sae.pretrained import DictionaryFormatError

D, F, D_OUT, K = 5, 20, 7, 3
IN, OUT = "blocks.8.hook_mlp_in", "blocks.8.hook_mlp_out"
NORM = "dataset_average_activation_norm."
THETA = "activation_function.log_jumprelu_threshold"
CONFIG = {
    "sae_type": "sae",
    "d_model": D,
    "expansion_factor": 4,
    "act_fn": "topk",
    "top_k": K,
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "use_decoder_bias": True,
    "hook_point_in": IN,
    "hook_point_out": OUT,
    "dtype": "torch.float32",
}


def arrays(make, d_out=D_OUT):
    given = make(W_E=(D, F), b_E=F, W_D=(F, d_out), b_D=d_out)
    return given | {NORM + IN: np.array(3.1, np.float32), NORM + OUT: np.array(0.7, np.float32)}


def put(peer, path, given, **changes):
    peer.write(path / "config.json", CONFIG | changes)
    peer.tensors(path / "sae_weights.safetensors", given)
    return path


def reference(peer, given, x, act, *, gate=True, s_in=None, s_out=None):
    w = peer.wide({n: a for n, a in given.items() if not n.startswith(NORM)})
    if s_in is None:
        s_in, s_out = (
            np.sqrt(D) / float(given[NORM + IN]),
            np.sqrt(D_OUT) / float(given[NORM + OUT]),
        )
    n = np.linalg.norm(w.W_D, axis=1) if gate else 1.0
    acts = act((x * s_in @ w.W_E + w.b_E) * n) / n
    return acts, (acts @ w.W_D + w.b_D) / s_out


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "topk", "jumprelu"])
def test_norms_over_the_data_set(tmp_path, make, peer, rows, agree, act_fn, gate):
    given = arrays(make)
    logarithms = make(theta=F)["theta"]
    act = {
        "relu": peer.relu,
        "topk": lambda h: peer.top_k(h, K),
        "jumprelu": lambda h: peer.jump(h, np.exp(logarithms.astype(np.float64))),
    }[act_fn]
    extra = {THETA: logarithms} if act_fn == "jumprelu" else {}
    path = put(peer, tmp_path, given | extra, act_fn=act_fn, sparsity_include_decoder_norm=gate)
    x = rows(D)
    agree(sae.load(path), x, *reference(peer, given, x, act, gate=gate))
    if act_fn != "relu":  # a gate by norms does nothing to a sign
        with pytest.raises(AssertionError, match="is off"):
            agree(sae.load(path), x, *reference(peer, given, x, act, gate=not gate))


@pytest.mark.parametrize("norm", ["token-wise", "inference"])
def test_other_norms(tmp_path, make, peer, rows, agree, norm):
    given = arrays(make, D)
    path = put(peer, tmp_path, given, norm_activation=norm, hook_point_out=IN)
    x = rows(D)
    s = np.sqrt(D) / np.linalg.norm(x, axis=1, keepdims=True) if norm == "token-wise" else 1.0
    wanted = reference(peer, given, x, lambda h: peer.top_k(h, K), s_in=s, s_out=s)
    dictionary = sae.load(path)
    assert dictionary.config.input_norm == ("rms" if norm == "token-wise" else "none")
    agree(dictionary, x, *wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae_type": "crosscoder"}, "sae_type must be one of"),
        ({"act_fn": "batchtopk"}, "act_fn must be one of"),
        ({"act_fn": "jumprelu", "norm_activation": "inference"}, "folded without the thresholds"),
        ({"act_fn": "jumprelu"}, r"missing \['activation_function.log_jumprelu_threshold'\]"),
        ({"norm_activation": "batch-wise"}, "norm_activation must be one of"),
        ({"norm_activation": "token-wise"}, "where hook points differ"),
        ({"use_glu_encoder": True}, "use_glu_encoder must be false"),
        ({"use_decoder_bias": False}, r"unknown \['b_D'\]"),
        ({"hook_point_out": "other"}, "must hold a positive dataset_average_activation_norm.other"),
        ({"expansion_factor": 3}, "must have shape"),
        ({"top_k": None}, "must have the key 'top_k'"),
    ],
)
def test_what_is_refused(tmp_path, make, peer, changes, message):
    with pytest.raises(DictionaryFormatError, match=message):
        sae.load(put(peer, tmp_path, arrays(make), **changes))
