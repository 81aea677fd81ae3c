import numpy as np
import pytest

import sae
from sae.architecture import JumpReLU, ReLU, TopK
from sae.pretrained import DictionaryFormatError

D, F, K = 7, 23, 4
pytestmark = pytest.mark.usefixtures("pickles_here")
SCALE = 0.37


def arrays(make, kind="ReLU", tied=False):
    given = make(encoder=(D, F), pre_bias=D, latent_bias=F)
    given |= {} if tied else make(decoder=(F, D))
    given |= make(**{"activation.log_threshold": F}) if kind == "JumpReLU" else {}
    return given | {"latents_activation_frequency": np.zeros(F, np.int64)}


def put(peer, path, given, name, mean=0.0, scale=SCALE):
    file = path / name
    model = {f"model.{n}": a for n, a in given.items()}
    peer.pt(file, model | {"mean_center": mean, "scaling_factor": scale, "target_norm": 2.6})
    return file


def reference(peer, given, x, kind="ReLU", mean=0.0, scale=SCALE):
    w = peer.wide(given)
    u = (x - mean) * scale
    h = (u - w.pre_bias) @ w.encoder + w.latent_bias
    acts = peer.top_k(h, K) if "TopK" in kind else peer.relu(h)
    if kind == "JumpReLU":
        acts = peer.jump(h, np.exp(w.activation_log_threshold))
    decoder = w.decoder if "decoder" in given else w.encoder.T
    return acts, (acts @ decoder + w.pre_bias) / scale + mean


@pytest.mark.parametrize("has_mean", [True, False])
@pytest.mark.parametrize(
    ("kind", "name", "form"),
    [
        ("ReLU", "23_7_ReLU_0.003_{}_False_-1.0_clip.pt", ReLU()),
        ("TopKReLU", "23_7_TopKReLU_4_{}_False_0.0_clip.pth", TopK(k=K)),
        ("TopKReLU", "23_7_TopKReLU_4_UW_{}_False_-1_clip.pth", TopK(k=K)),
        ("JumpReLU", "23_7_JumpReLU_{}_False_0.0_clip.pth", JumpReLU()),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_each_form(tmp_path, make, peer, rows, agree, kind, name, form, tied, has_mean):
    given, mean = arrays(make, kind, tied), make(m=D)["m"] if has_mean else 0.0
    dictionary = sae.load(put(peer, tmp_path, given, name.format(tied), mean), allow_pt=True)
    assert dictionary.config.activation == form
    x = rows(D)
    agree(dictionary, x, *reference(peer, given, x, kind, mean))
    for wrong in ({"scale": 1.0}, {"mean": mean + 1}):
        with pytest.raises(AssertionError, match="is off"):
            agree(dictionary, x, *reference(peer, given, x, kind, **({"mean": mean} | wrong)))


def test_a_topk_without_relu_must_be_named(tmp_path, make, peer, rows, agree):
    given = arrays(make)
    given["latent_bias"] += 9
    path = put(peer, tmp_path, given, "23_7_TopK_4_False_False_0.0.pth")
    with pytest.raises(DictionaryFormatError, match="must cut negative values at 0"):
        sae.load(path, allow_pt=True)
    x = rows(D)
    agree(sae.load(path, format="msae", allow_pt=True), x, *reference(peer, given, x, "TopK"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.pth", "must have the name that MSAE gave it"),
        ("23_7_TopKReLU_4_False_False_30.0.pth", "the cap of the latents must not be positive"),
        ("23_7_ReLU_0.1_False_True_0.0.pth", "normalize must be False"),
        ("23_7_BatchTopKReLU_4_False_False_0.0.pth", "the activation must be one of"),
        ("23_7_TopKabsReLU_4_False_False_0.0.pth", "the activation must be one of"),
        ("23_7_TopKReLU_x_False_False_0.0.pth", "k must stand in the name"),
        ("23_7_JumpReLU_False_False_0.0.pth", r"missing \['activation.log_threshold'\]"),
        ("23_8_ReLU_0_False_False_0.0.pth", "must have shape"),
        ("23_7_ReLU_0_True_False_0.0.pth", r"unknown \['decoder'\]"),
    ],
)
def test_names_that_are_refused(tmp_path, make, peer, name, message):
    with pytest.raises(DictionaryFormatError, match=message):
        sae.load(put(peer, tmp_path, arrays(make), name), allow_pt=True)


def test_scaling_that_is_not_known_is_refused(tmp_path, make, peer):
    name = "23_7_ReLU_0_False_False_0.0.pth"
    for scale in (0.0, -1.0, None, np.ones(2, np.float32)):
        path = put(peer, tmp_path, arrays(make), name, scale=scale)
        with pytest.raises(DictionaryFormatError, match="a positive scaling_factor"):
            sae.load(path, allow_pt=True)
    path = put(peer, tmp_path, arrays(make), name, mean=np.ones(3, np.float32))
    with pytest.raises(DictionaryFormatError, match="mean_center must have 7 numbers, got 3"):
        sae.load(path, allow_pt=True)
