"""Square weights, whose shapes tell nothing: each format's own orientation, and no other."""

import io
import json

import numpy as np
import pytest
import torch

import sae

D = 7
pytestmark = pytest.mark.usefixtures("pickles_here")
VIT = {
    "d_in": D, "expansion_factor": 1, "activation_fn_str": "relu", "hook_point_layer": 1,
    "normalize_activations": "none",
}  # fmt: skip
LLAMA = {
    "d_model": D, "d_sae": D, "act_fn": "jumprelu", "jump_relu_threshold": 0.1,
    "norm_activation": "dataset-wise", "use_decoder_bias": False,
    "dataset_average_activation_norm": {"in": float(np.sqrt(D)), "out": float(np.sqrt(D))},
    "sparsity_include_decoder_norm": False, "apply_decoder_bias_to_pre_encoder": False,
}  # fmt: skip
SCOPIUM = {
    "d_model": D, "expansion_factor": 1, "act_fn": "relu", "norm_activation": "inference",
    "use_decoder_bias": False, "sparsity_include_decoder_norm": False,
    "hook_point_in": "a", "hook_point_out": "a",
}  # fmt: skip
VECTORS = {
    "openai": ("pre_bias", "latent_bias"),
    "goodfire": ("encoder_linear.bias", "decoder_linear.bias"),
    "llama_scope": ("encoder.bias",),
    "llamascopium": ("b_E",),
    "vit_prisma": ("b_enc", "b_dec"),
    "saev": ("b_enc", "b_dec"),
    "msae": ("pre_bias", "latent_bias"),
    "overcomplete": ("encoder.bias",),
}
MATRICES = {  # name of the encoder and whether its rows are latents, the same of the decoder
    "openai": (("encoder.weight", True), ("decoder.weight", False)),
    "goodfire": (("encoder_linear.weight", True), ("decoder_linear.weight", False)),
    "llama_scope": (("encoder.weight", True), ("decoder.weight", False)),
    "llamascopium": (("W_E", False), ("W_D", True)),
    "vit_prisma": (("W_enc", False), ("W_dec", True)),
    "saev": (("W_enc", False), ("W_dec", True)),
    "msae": (("encoder", False), ("decoder", True)),
    "overcomplete": (("encoder.weight", True), ("dictionary._weights", True)),
}


def put(peer, path, kind, given):
    """Write the files of a format; return what is loaded."""
    if kind == "llama_scope":
        peer.write(path / "hyperparams.json", LLAMA)
        peer.tensors(path / "checkpoints" / "final.safetensors", given)
        return path
    if kind == "llamascopium":
        peer.write(path / "config.json", SCOPIUM)
        peer.tensors(path / "sae_weights.safetensors", given)
        return path
    if kind == "saev":
        stream = io.BytesIO()
        torch.save({name: torch.from_numpy(array.copy()) for name, array in given.items()}, stream)
        cfg = {"d_vit": D, "exp_factor": 1, "activation": {"cls": "Relu", "params": {}}}
        line = json.dumps({"schema": 2, "cfg": cfg}).encode() + b"\n"
        (path / "x.pt").write_bytes(line + stream.getvalue())
        return path / "x.pt"
    if kind == "msae":
        model = {f"model.{name}": array for name, array in given.items()}
        name = f"{D}_{D}_ReLU_0_False_False_0.0.pth"
        peer.pt(path / name, model | {"mean_center": 0.0, "scaling_factor": 1.0})
        return path / name
    if kind == "vit_prisma":
        peer.write(path / "config.json", VIT)
    if kind == "overcomplete":
        peer.write(path / "overcomplete.json", {"class": "SAE", "normalization": "identity"})
        given = given | {"dictionary.multiplier": np.array(0.0, np.float32)}
    peer.pt(path / "x.pt", given)
    return path / "x.pt"


@pytest.mark.parametrize("kind", MATRICES)
def test_square_weights(tmp_path, make, peer, kind):
    encoder, decoder = MATRICES[kind]
    vectors = make(**dict.fromkeys(VECTORS[kind], D))
    given = make(**{encoder[0]: (D, D), decoder[0]: (D, D)}) | vectors
    result = sae.load(put(peer, tmp_path, kind, given), allow_pt=True)
    for rows, (name, are_latents) in ((result.enc_rows, encoder), (result.dec_rows, decoder)):
        stored = given[name] if are_latents else given[name].T
        assert np.allclose(rows.detach().numpy(), stored, rtol=1e-6)
        assert not np.allclose(rows.detach().numpy(), stored.T, rtol=1e-2)
