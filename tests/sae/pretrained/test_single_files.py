"""Releases of one pickled file per dictionary: OpenAI, Goodfire, Qwen Scope."""

import numpy as np
import pytest

import sae
from sae.architecture import ReLU, TopK
from sae.pretrained import DictionaryFormatError

D, F, K = 7, 23, 3
pytestmark = pytest.mark.usefixtures("pickles_here")


def openai(make, d_sae=F):
    shapes = {"encoder.weight": (d_sae, D), "decoder.weight": (D, d_sae)}
    return make(pre_bias=D, latent_bias=d_sae, **shapes)


STATISTICS = {
    "stats_last_nonzero": np.zeros(F, np.int64),
    "latents_activation_frequency": np.full(F, np.nan, np.float32),
    "latents_mean_square": np.zeros(F, np.float32),
}
TOPK = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}


def openai_reference(peer, given, x, k=None):
    w = peer.wide(given)
    mean, std, u = 0.0, 1.0, x
    if k:
        mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
        u = (x - mean) / (std + 1e-5)
    h = (u - w.pre_bias) @ w.encoder_weight.T + w.latent_bias
    acts = peer.top_k(h, k) if k else peer.relu(h)
    return acts, (acts @ w.decoder_weight.T + w.pre_bias) * std + mean


@pytest.mark.parametrize("d_sae", [D, F])
@pytest.mark.parametrize(
    ("others", "k"),
    [
        ({}, None),
        ({"activation": "ReLU", "activation_state_dict": {}}, None),
        (TOPK, K),
        ({"activation": "TopK", "activation.k": K, "activation.postact_fn": "ReLU"}, K),
        ({"activation": "TopK", "activation_state_dict": {"k": np.array(K)}}, K),
    ],
)
def test_openai(tmp_path, make, peer, rows, agree, others, k, d_sae):
    given = openai(make, d_sae)
    peer.pt(tmp_path / "5.pt", given | STATISTICS | others)
    dictionary = sae.load(tmp_path / "5.pt", allow_pt=True)
    assert dictionary.config.activation == (TopK(k=k) if k else ReLU())
    x = rows(D) * 3 + 1
    agree(dictionary, x, *openai_reference(peer, given, x, k))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"activation": "TopK"}, r"must have activation_state_dict\.k"),
        ({"activation": "Softmax"}, "activation must be one of"),
        ({"activation": "TopK", "activation.k": 2, "activation.postact_fn": "Identity"}, "one of"),
        ({"new": 3}, r"known keys, got \['new'\]"),
        ({"odd": np.zeros(3, np.float32)}, r"unknown \['odd'\]"),
        ({"latent_bias": np.full(F, np.nan, np.float32)}, "b_enc must hold finite"),
        ({"decoder.weight": np.zeros((F, D), np.float32)}, r"decoder\.weight must have shape"),
    ],
)
def test_openai_refuses(tmp_path, make, peer, others, message):
    peer.pt(tmp_path / "5.pt", openai(make) | others)
    with pytest.raises(DictionaryFormatError, match=message):
        sae.load(tmp_path / "5.pt", allow_pt=True)


def test_goodfire(tmp_path, make, peer, rows, agree):
    given = make(**{
        "encoder_linear.weight": (F, D),
        "encoder_linear.bias": F,
        "decoder_linear.weight": (D, F),
        "decoder_linear.bias": D,
    })
    peer.pt(tmp_path / "Llama.pth", given)
    x, w = rows(D), peer.wide(given)
    acts = peer.relu(x @ w.encoder_linear_weight.T + w.encoder_linear_bias)
    x_hat = acts @ w.decoder_linear_weight.T + w.decoder_linear_bias
    agree(sae.load(tmp_path / "Llama.pth", allow_pt=True), x, acts, x_hat)
    agree(sae.load(tmp_path, format="goodfire", allow_pt=True), x, acts, x_hat)
    del given["decoder_linear.bias"]
    peer.pt(tmp_path / "Llama.pth", given)
    with pytest.raises(DictionaryFormatError, match=r"missing \['decoder_linear.bias'\]"):
        sae.load(tmp_path / "Llama.pth", allow_pt=True)


def qwen(peer, path, given):
    folder = path / f"SAE-Res-Qwen3-1.7B-W32K-L0_{K}"
    peer.pt(folder / "layer7.sae.pt", given)
    return folder / "layer7.sae.pt"


def qwen_reference(peer, given, x):
    w = peer.wide(given)
    acts = peer.top_k(x @ w.W_enc.T + w.b_enc, K)
    return acts, acts @ w.W_dec.T + w.b_dec


def test_qwen_scope(tmp_path, make, peer, rows, agree):
    given = make(W_enc=(F, D), W_dec=(D, F), b_enc=F, b_dec=D)
    path = qwen(peer, tmp_path, given)
    x = rows(D)
    agree(sae.load(path, allow_pt=True), x, *qwen_reference(peer, given, x))
    peer.pt(tmp_path / "layer7.sae.pt", given)
    with pytest.raises(DictionaryFormatError, match="k stands nowhere else"):
        sae.load(tmp_path / "layer7.sae.pt", allow_pt=True)
    with pytest.raises(DictionaryFormatError, match="W_enc must have shape"):
        sae.load(qwen(peer, tmp_path, given | {"W_enc": given["W_enc"].T}), allow_pt=True)


def test_qwen_scope_must_be_named_where_shapes_do_not_show_it(tmp_path, make, peer, rows, agree):
    given = make(W_enc=(D, D), W_dec=(D, D), b_enc=D, b_dec=D)
    path = qwen(peer, tmp_path, given)
    with pytest.raises(DictionaryFormatError, match="show its orientation by its shape"):
        sae.load(path, allow_pt=True)
    x = rows(D)
    dictionary = sae.load(path, format="qwen_scope", allow_pt=True)
    agree(dictionary, x, *qwen_reference(peer, given, x))
    with pytest.raises(AssertionError, match="is off"):
        agree(dictionary, x, *qwen_reference(peer, given | {"W_enc": given["W_enc"].T}, x))


def test_a_file_that_nobody_knows(tmp_path, peer, make):
    peer.pt(tmp_path / "x.pt", make(weight=(D, F)))
    with pytest.raises(DictionaryFormatError, match="pass allow_pt=True"):
        sae.load(tmp_path / "x.pt")
    with pytest.raises(DictionaryFormatError, match="name the format by format="):
        sae.load(tmp_path / "x.pt", allow_pt=True)
