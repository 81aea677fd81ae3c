"""Llama Scope (OpenMOSS, 2024): hyperparams.json and checkpoints/final.safetensors.

JumpReLU with one threshold for all latents, on pre-activations times the decoder's norms; the
norms of the input and of the output are two numbers of the config.
"""

import math

from sae.architecture import JumpReLU, SAEConfig
from sae.pretrained import rewrite
from sae.pretrained.canonical import Reading, Weights, in_memory
from sae.pretrained.files import Files, expect_keys, expect_shape
from sae.pretrained.foreign import DictionaryFormatError, Fields

FORMAT = "llama_scope"
CHECKED_AGAINST = "the authors' initialiser as published"
CONFIG = "hyperparams.json"
WEIGHTS = "checkpoints/final.safetensors"
TENSORS = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
SITE = ("hook_point_in", "hook_point_out")


def fits(files: Files) -> bool:
    """Whether the files are there."""
    return files.has(CONFIG) and files.has(WEIGHTS)


def readings(files: Files) -> dict[str, Reading]:
    """Both gates, whatever the config says: users and tools disagree on which was trained."""
    return {
        "gate by decoder norms": _read(files, gate=True),
        "gate by h alone": _read(files, gate=False),
    }


def read(files: Files) -> Reading:
    """Read a dictionary of Llama Scope and fold it as its authors' initialiser did.

    Raises:
        DictionaryFormatError: If something is missing or unknown, or if the files ask for another
            function than that of the release.
    """
    return _read(files)


def _read(files: Files, gate: bool | None = None) -> Reading:
    cfg = Fields(files.json(CONFIG), CONFIG)
    cfg.word("act_fn", ("jumprelu",))
    cfg.word("norm_activation", ("dataset-wise",))
    if cfg.flag("apply_decoder_bias_to_pre_encoder"):
        raise DictionaryFormatError("apply_decoder_bias_to_pre_encoder must be false, got true")
    d, d_sae = cfg.whole("d_model"), cfg.whole("d_sae")
    threshold = cfg.number("jump_relu_threshold")
    if threshold < 0:
        raise DictionaryFormatError(f"jump_relu_threshold must be at least 0, got {threshold}")
    has_bias = cfg.flag("use_decoder_bias")
    raw = files.tensors(WEIGHTS)
    expect_keys(raw, TENSORS if has_bias else TENSORS - {"decoder.bias"}, WEIGHTS)
    shapes = {"encoder.weight": (d_sae, d), "decoder.weight": (d, d_sae), "decoder.bias": (d,)}
    for name, tensor in raw.items():
        expect_shape(tensor, shapes.get(name, (d_sae,)), name)
    stored = Weights(
        enc_rows=raw["encoder.weight"],
        dec_rows=raw["decoder.weight"].T,
        b_enc=raw["encoder.bias"],
        b_dec=raw["decoder.bias"] if has_bias else raw["encoder.bias"].new_zeros(d),
    )
    gate = cfg.flag("sparsity_include_decoder_norm") if gate is None else gate
    weights, done = _folded(cfg, in_memory(stored, files.latents), gate)
    weights = rewrite.one_threshold_for_all(weights, threshold)
    config = SAEConfig(d_in=d, d_sae=d_sae, activation=JumpReLU(), b_in="none")
    return Reading(config=config, weights=weights, folds=done, site=cfg.texts(SITE))


def _folded(cfg: Fields, weights: Weights, gate: bool) -> tuple[Weights, tuple[str, ...]]:
    """The norms first, then the decoder's: for transcoders the order matters."""
    norms = cfg.part("dataset_average_activation_norm")
    norm_in, norm_out = norms.number("in"), norms.number("out")
    if min(norm_in, norm_out) <= 0:
        raise DictionaryFormatError(
            f"dataset_average_activation_norm must be positive, got {norm_in} and {norm_out}"
        )
    s_in, s_out = math.sqrt(weights.d_in) / norm_in, math.sqrt(weights.d_in) / norm_out
    weights = rewrite.scales_scaling_latents(weights, s_in, s_out)
    done = (f"norms folded: input {s_in:.6g}, output {s_out:.6g}, latents in units of raw rows",)
    if gate:
        weights = rewrite.decoder_norm_gate(weights)
        done += ("decoder norms, by which the activation gates, moved into the encoder",)
    return weights, done
