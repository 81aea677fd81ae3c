"""Transcoders as circuit-tracer keeps them (mwhanna, mntss): layer_N.safetensors.

Of a cross-layer transcoder there are W_enc_N.safetensors and W_dec_N.safetensors instead.
"""

import re

import torch
from torch import Tensor

from sae.architecture import Activation, JumpReLU, ReLU, SAEConfig, TopK
from sae.pretrained.canonical import Reading, Weights, in_memory
from sae.pretrained.files import Files, expect_keys, expect_shape
from sae.pretrained.foreign import DictionaryFormatError, needs_name

FORMAT = "circuit_tracer"
CHECKED_AGAINST = "circuit-tracer's code, read"
ONE = re.compile(r"layer_(\d+)\.safetensors")
CROSS = re.compile(r"W_enc_(\d+)\.safetensors")
TENSORS = {"W_enc", "W_dec", "b_enc", "b_dec"}
THRESHOLD = "activation_function.threshold"
CONFIGS = ("config.yaml", "wandb-config.yaml", "wanb-config.yaml")
K = re.compile(rb"^k\s*:\s*(\d{1,9})\s*$", re.MULTILINE)
SAYS_TOPK = re.compile(rb"^\s*activation\w*\s*:\s*['\"]?topk", re.MULTILINE | re.IGNORECASE)


def fits(files: Files) -> bool:
    """Whether it is a file of one layer, or the directory of such."""
    name = files.path.name
    is_file = ONE.fullmatch(name) or CROSS.fullmatch(name)
    return bool(is_file) or files.has("W_enc_0.safetensors") or files.has("layer_0.safetensors")


def read(files: Files) -> Reading:
    """Read the transcoder of one layer, or one source layer of a cross-layer transcoder.

    Raises:
        DictionaryFormatError: For a directory, if something is missing or unknown, or where the
            activation or the orientation is not certain.
    """
    name = files.path.name
    if cross := CROSS.fullmatch(name):
        return _cross(files, int(cross[1]))
    one = ONE.fullmatch(name)
    if one is None:
        raise DictionaryFormatError(
            f"{files.path} must be one file, for it has one dictionary per layer, got the "
            "directory; pass one of its files"
        )
    raw = files.tensors(name)
    expect_keys(raw, TENSORS, name, frozenset({"W_skip", THRESHOLD, "k"}))
    d_sae, d = raw["b_enc"].numel(), raw["b_dec"].numel()
    matrix = {"W_enc": (d_sae, d), "W_dec": (d_sae, d), "W_skip": (d, d), "b_dec": (d,)}
    for key, tensor in raw.items():
        if key != "k":
            expect_shape(tensor, matrix.get(key, (d_sae,)), key)
    stored = Weights(
        enc_rows=raw["W_enc"],
        dec_rows=raw["W_dec"],
        b_enc=raw["b_enc"],
        b_dec=raw["b_dec"],
        threshold=raw.get(THRESHOLD),
        skip_rows=raw.get("W_skip"),
    )
    config = SAEConfig(
        d_in=d,
        d_sae=d_sae,
        activation=_activation(files, raw.get("k"), stored.threshold),
        b_in="none",
        skip="W_skip" in raw,
    )
    _check_orientation(files, d, d_sae)
    site = {"layer": one[1], "reads": "the MLP's input; predicts its output"}
    return Reading(config=config, weights=in_memory(stored, files.latents), site=site)


def _cross(files: Files, layer: int) -> Reading:
    """W_dec is stored as (d_sae, n_targets, d), the targets counted from the source layer."""
    decoder = f"W_dec_{layer}.safetensors"
    raw = {**files.tensors(files.path.name), **files.tensors(decoder)}
    raw = {key.removesuffix(f"_{layer}"): tensor for key, tensor in raw.items()}
    expect_keys(raw, TENSORS, f"{files.path.name} and {decoder}", frozenset({"threshold"}))
    d_sae, d = raw["b_enc"].numel(), raw["b_dec"].numel()
    n = raw["W_dec"].shape[1] if raw["W_dec"].dim() == 3 else 1
    shapes = {"W_enc": (d_sae, d), "W_dec": (d_sae, n, d), "b_dec": (d,)}
    for key, tensor in raw.items():
        expect_shape(tensor, shapes.get(key, (d_sae,)), key)
    stored = Weights(
        enc_rows=raw["W_enc"],
        dec_rows=raw["W_dec"].flatten(1),
        b_enc=raw["b_enc"],
        b_dec=torch.cat([raw["b_dec"], raw["b_dec"].new_zeros((n - 1) * d)]),
        threshold=raw.get("threshold"),
    )
    config = SAEConfig(
        d_in=d,
        d_sae=d_sae,
        d_out=n * d,
        activation=_activation(files, None, stored.threshold),
        b_in="none",
    )
    _check_orientation(files, d, d_sae)
    site = {
        "source_layer": str(layer),
        "output": f"layers {layer} to {layer + n - 1} of {d} side by side",
    }
    return Reading(config=config, weights=in_memory(stored, files.latents), site=site)


def _activation(files: Files, k: Tensor | None, threshold: Tensor | None) -> Activation:
    if k is not None and k.numel() == 1 and threshold is None:
        needs_name(files.is_named, FORMAT)
        return TopK(k=int(k))
    if k is not None:
        raise DictionaryFormatError("k must be one number without thresholds beside it")
    if threshold is None and (k_of_config := _k_of_config(files)):
        needs_name(files.is_named, FORMAT)
        return TopK(k=k_of_config)
    says_topk = (files.has_sibling(c) and SAYS_TOPK.search(files.text(c)) for c in CONFIGS)
    if any(says_topk):
        raise DictionaryFormatError(
            f"{files.path.name} must hold k where its config says top-k, got none"
        )
    return ReLU() if threshold is None else JumpReLU()


def _k_of_config(files: Files) -> int:
    """The k of a config that says top-k, as circuit-tracer's own reader takes it; 0 without."""
    texts = [files.text(name) for name in CONFIGS if files.has_sibling(name)]
    results = {int(k) for text in texts if SAYS_TOPK.search(text) for k in K.findall(text)}
    return results.pop() if len(results) == 1 else 0


def _check_orientation(files: Files, d: int, d_sae: int) -> None:
    if d == d_sae and not files.is_named:
        raise DictionaryFormatError(
            f"W_enc must show its orientation by its shape, got {(d_sae, d)}; name the format by "
            f"format={FORMAT!r} if its rows are latents"
        )
