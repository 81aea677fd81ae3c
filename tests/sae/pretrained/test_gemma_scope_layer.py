import numpy as np
import pytest

import sae
from sae.pretrained import DictionaryFormatError, load_with_source

D, F, N = 5, 11, 3
CONFIG = {
    "architecture": "jump_relu",
    "width": F * N,
    "model_name": "google/gemma-3-270m-pt",
    "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output",
    "l0": 150,
    "type": "clt",
    "affine_connection": False,
}


def arrays(make, skip=False, d_sae=F):
    shapes = {"w_enc": (D, d_sae), "w_dec": (d_sae, N, D), "b_enc": d_sae, "b_dec": D}
    more = {"affine_skip_connection": (D, D)} if skip else {}
    return [make(**shapes, threshold=d_sae, **more) for _ in range(N)]


def put(peer, path, given, **changes):
    if changes is not None:
        peer.write(path / "config.json", CONFIG | changes)
    for layer, part in enumerate(given):
        peer.tensors(path / f"params_layer_{layer}.safetensors", part)
    return path


def whole(peer, given, x, *, causal):
    """The sum over source layers as circuit-tracer has it: (batch, layer, d)."""
    parts = [peer.wide(part) for part in given]
    acts = [peer.jump(x[:, i] @ w.w_enc + w.b_enc, w.threshold) for i, w in enumerate(parts)]
    y = np.stack([np.broadcast_to(w.b_dec, (len(x), D)) for w in parts], axis=1)
    for i, w in enumerate(parts):
        written = np.einsum("nf,ftd->ntd", acts[i], w.w_dec)
        if causal:
            written[:, :i] = 0
        y = y + written
        if hasattr(w, "affine_skip_connection"):
            y[:, i] += x[:, i] @ w.affine_skip_connection
    return acts, y


def summed(path, x):
    import torch

    parts = [sae.load(path / f"params_layer_{i}.safetensors").double() for i in range(N)]
    with torch.no_grad():
        outputs = [part(torch.from_numpy(x[:, i])) for i, part in enumerate(parts)]
        acts = [part.encode_dense(torch.from_numpy(x[:, i])) for i, part in enumerate(parts)]
    return [a.numpy() for a in acts], sum(outputs).numpy().reshape(len(x), N, D)


def differs(got, wanted):
    return np.abs(got - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", ["clt", "crosscoder"])
def test_the_files_sum_to_the_whole(tmp_path, make, peer, kind, skip):
    given = arrays(make, skip)
    path = put(peer, tmp_path, given, type=kind, affine_connection=skip)
    x = np.random.default_rng(3).standard_normal((29, N, D))
    acts, y = whole(peer, given, x, causal=kind == "clt")
    got_acts, got_y = summed(path, x)
    assert differs(got_y, y) < 1e-6
    assert all(differs(a, b) < 1e-6 for a, b in zip(got_acts, acts, strict=True))
    # relative target layers, and writing to layers before the source, are other functions
    assert differs(got_y, whole(peer, given, x, causal=kind != "clt")[1]) > 0.01
    shifted = [p | {"w_dec": np.roll(p["w_dec"], i, axis=1)} for i, p in enumerate(given)]
    assert differs(got_y, whole(peer, shifted, x, causal=kind == "clt")[1]) > 0.01


def test_a_transposed_skip_is_another_function(tmp_path, make, peer):
    given = arrays(make, skip=True)
    path = put(peer, tmp_path, given, affine_connection=True)
    x = np.random.default_rng(3).standard_normal((29, N, D))
    name = "affine_skip_connection"
    turned = [part | {name: part[name].T} for part in given]
    got = summed(path, x)[1]
    assert differs(got, whole(peer, given, x, causal=True)[1]) < 1e-6
    assert differs(got, whole(peer, turned, x, causal=True)[1]) > 0.01


def test_what_is_told_of_the_source(tmp_path, make, peer):
    path = put(peer, tmp_path / "clt" / "width_1k_l0_big", arrays(make, d_sae=341), width=1023)
    source = load_with_source(path / "params_layer_1.safetensors").source
    assert source.folds_applied == (
        "thresholds below 0 raised to 0",
        "what the decoder has for layers before the source dropped",
    )
    assert source.site["source_layer"] == "1"
    config = sae.load(path / "params_layer_1.safetensors").config
    assert [s.hook_point for s in config.inputs] == ["model.layers.1.pre_feedforward_layernorm:out"]
    assert [s.hook_point for s in config.outputs] == [
        f"model.layers.{i}.post_feedforward_layernorm:out" for i in range(N)
    ]
    assert source.site["width"] == "1k"
    assert source.site["output"] == "3 layers of 5 side by side"
    assert "circuit-tracer" in source.checked_against


def test_without_a_config_the_kind_must_show(tmp_path, make, peer):
    given = arrays(make)
    for layer, part in enumerate(given):
        peer.tensors(tmp_path / "x" / f"params_layer_{layer}.safetensors", part)
        peer.tensors(tmp_path / "crosscoder" / f"params_layer_{layer}.safetensors", part)
    assert sae.load(tmp_path / "x" / "params_layer_0.safetensors").config.d_out == N * D
    with pytest.raises(DictionaryFormatError, match="w_dec must be 0 for layers before the source"):
        sae.load(tmp_path / "x" / "params_layer_1.safetensors")
    assert sae.load(tmp_path / "crosscoder" / "params_layer_1.safetensors").config.d_sae == F


def test_layers_that_a_crosscoder_lists(tmp_path, make, peer):
    point = "model.layers.{5,9,12}.output"
    changes = {"type": "crosscoder", "hf_hook_point_in": point, "hf_hook_point_out": point}
    path = put(peer, tmp_path, arrays(make), **changes)
    config = sae.load(path / "params_layer_1.safetensors").config
    assert [s.hook_point for s in config.inputs] == ["model.layers.9:out"]
    names = ["model.layers.5:out", "model.layers.9:out", "model.layers.12:out"]
    assert [s.hook_point for s in config.outputs] == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": F}, "width must be that of all source layers, 33"),
        ({"type": "sae"}, "type must be one of"),
        ({"architecture": "relu"}, "architecture must be one of"),
        ({"new": 1}, "known keys"),
    ],
)
def test_configs_that_are_refused(tmp_path, make, peer, changes, message):
    path = put(peer, tmp_path, arrays(make), **changes)
    with pytest.raises(DictionaryFormatError, match=message):
        sae.load(path / "params_layer_0.safetensors")


def test_files_that_are_refused(tmp_path, make, peer):
    path = put(peer, tmp_path, arrays(make))
    with pytest.raises(DictionaryFormatError, match="must be one file"):
        sae.load(path)
    (path / "params_layer_2.safetensors").rename(path / "params_layer_7.safetensors")
    with pytest.raises(DictionaryFormatError, match="must be below the number of layers 3, got 7"):
        sae.load(path / "params_layer_7.safetensors")
    given = arrays(make)[0]
    peer.tensors(path / "params_layer_0.safetensors", given | {"w_dec": given["w_dec"][:, 0]})
    with pytest.raises(DictionaryFormatError, match="w_dec must have shape"):
        sae.load(path / "params_layer_0.safetensors")


def test_one_latent_of_a_layer(tmp_path, make, peer):
    given = arrays(make)
    path = put(peer, tmp_path, given)
    part = sae.load(path / "params_layer_0.safetensors", latents=4)
    assert np.array_equal(part.W_dec.numpy(), given[0]["w_dec"][4:5].reshape(1, -1))
