import numpy as np
import pytest

import sae
from sae.pretrained import DictionaryFormatError, load_with_source, rewrite

D, F = 7, 23
THRESHOLD, NORM_IN, NORM_OUT = 0.4, 6.3125, 1.7
CONFIG = {
    "d_model": D,
    "d_sae": F,
    "act_fn": "jumprelu",
    "jump_relu_threshold": THRESHOLD,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": NORM_IN, "out": NORM_OUT},
    "sparsity_include_decoder_norm": True,
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "top_k": 50,
    "hook_point_in": "blocks.8.hook_resid_post",
    "hook_point_out": "blocks.8.hook_resid_post",
}


def arrays(make, d_sae=F):
    return make(**{
        "encoder.weight": (d_sae, D),
        "encoder.bias": d_sae,
        "decoder.weight": (D, d_sae),
        "decoder.bias": D,
    })


def put(peer, path, given, **changes):
    peer.write(path / "hyperparams.json", CONFIG | changes)
    peer.tensors(path / "checkpoints" / "final.safetensors", given)
    return path


def reference(peer, given, x, *, gate=True, norm_out=NORM_OUT):
    """The release's own initialiser, step by step, then its encode and decode on raw rows."""
    w = peer.wide(given)
    s_in, s_out = np.sqrt(D) / NORM_IN, np.sqrt(D) / norm_out
    b_enc, b_dec = w.encoder_bias / s_in, w.decoder_bias / s_out
    decoder, encoder = w.decoder_weight * s_in / s_out, w.encoder_weight
    if gate:
        n = np.linalg.norm(decoder, axis=0)
        decoder, encoder, b_enc = decoder / n, encoder * n[:, None], b_enc * n
    acts = peer.jump(x @ encoder.T + b_enc, THRESHOLD)
    return acts, acts @ decoder.T + b_dec


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("d_sae", [D, F])
def test_the_initialiser_of_the_release(tmp_path, make, peer, rows, agree, gate, d_sae):
    given = arrays(make, d_sae)
    path = put(peer, tmp_path, given, d_sae=d_sae, sparsity_include_decoder_norm=gate)
    loaded = load_with_source(path)
    x = rows(D)
    agree(loaded.dictionary, x, *reference(peer, given, x, gate=gate))
    assert len(loaded.source.folds_applied) == 1 + gate
    assert loaded.source.source_sha256.keys() == {
        "hyperparams.json",
        "checkpoints/final.safetensors",
    }


def test_what_others_read_is_another_function(tmp_path, make, peer, rows, agree, monkeypatch):
    given = arrays(make)
    path = put(peer, tmp_path, given)
    x = rows(D)
    for wrong in ({"gate": False}, {"norm_out": NORM_IN}):
        with pytest.raises(AssertionError, match="is off"):
            agree(sae.load(path), x, *reference(peer, given, x, **wrong))
    put(peer, tmp_path, given, sparsity_include_decoder_norm=False)
    wanted = reference(peer, given, x, gate=False)
    agree(sae.load(path), x, *wanted)
    monkeypatch.setattr(rewrite, "scales_scaling_latents", rewrite.scales_keeping_latents)
    with pytest.raises(AssertionError, match="is off"):  # the threshold is one of raw rows
        agree(sae.load(path), x, *wanted)


def test_without_a_bias_of_the_decoder(tmp_path, make, peer, rows, agree):
    given = arrays(make)
    none = given | {"decoder.bias": np.zeros(D, np.float32)}
    del given["decoder.bias"]
    x = rows(D)
    agree(
        sae.load(put(peer, tmp_path, given, use_decoder_bias=False)), x, *reference(peer, none, x)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "topk"}, "act_fn must be one of"),
        ({"norm_activation": "token-wise"}, "norm_activation must be one of"),
        ({"dataset_average_activation_norm": None}, "must have the key 'dataset_average"),
        ({"dataset_average_activation_norm": {"in": 2}}, "must have the key 'out'"),
        ({"dataset_average_activation_norm": {"in": 2, "out": 0}}, "must be positive"),
        ({"dataset_average_activation_norm": {"in": 1e-300, "out": 2}}, "finite after folding"),
        ({"jump_relu_threshold": 10**400}, r"jump_relu_threshold must be a number within 1e\+30"),
        ({"jump_relu_threshold": None}, "must have the key 'jump_relu_threshold'"),
        ({"jump_relu_threshold": -0.1}, "jump_relu_threshold must be at least 0"),
        ({"apply_decoder_bias_to_pre_encoder": True}, "must be false"),
        ({"sparsity_include_decoder_norm": None}, "must have the key"),
        ({"use_decoder_bias": False}, r"unknown \['decoder.bias'\]"),
        ({"d_sae": F + 1}, "must have shape"),
    ],
)
def test_what_is_refused(tmp_path, make, peer, changes, message):
    with pytest.raises(DictionaryFormatError, match=message):
        sae.load(put(peer, tmp_path, arrays(make), **changes))


def test_the_other_orientation_is_seen(tmp_path, make, peer):
    given = arrays(make)
    turned = given | {"decoder.weight": given["decoder.weight"].T}
    with pytest.raises(DictionaryFormatError, match=r"decoder\.weight must have shape"):
        sae.load(put(peer, tmp_path, turned))
