"""Llamascopium (OpenMOSS, current): config.json and sae_weights.safetensors with W_E and W_D."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from sae.architecture import Activation, JumpReLU, ReLU, SAEConfig, TopK
from sae.pretrained import rewrite
from sae.pretrained.canonical import Reading, Weights, in_memory
from sae.pretrained.files import Files, expect_keys, expect_shape
from sae.pretrained.foreign import DictionaryFormatError, Fields

FORMAT = "llamascopium"
CHECKED_AGAINST = "the published code"
CONFIG = "config.json"
WEIGHTS = "sae_weights.safetensors"
NORM = "dataset_average_activation_norm."
THRESHOLD = "activation_function.log_jumprelu_threshold"
SITE = ("hook_point_in", "hook_point_out")
NORMS = ("dataset-wise", "token-wise", "inference")


def fits(files: Files) -> bool:
    """Whether the files are there."""
    return files.has(CONFIG) and "W_E" in files.tensor_names(WEIGHTS)


def read(files: Files) -> Reading:
    """Read a dictionary of Llamascopium; norms and the decoder-norm gate stay operations.

    Raises:
        DictionaryFormatError: If something is missing or unknown; for BatchTopK, which has no
            threshold in the file; for a JumpReLU whose norm was folded, because its thresholds
            were not; for gated linear encoders and other types than 'sae'.
    """
    return reading(Fields(files.json(CONFIG), CONFIG), files.tensors(WEIGHTS), files)


def reading(cfg: Fields, raw: dict[str, Tensor], files: Files) -> Reading:
    """Read from a config and tensors under the names of this format."""
    cfg.word("sae_type", ("sae",), "sae")
    for key in ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder"):
        if cfg.flag(key, False):
            raise DictionaryFormatError(
                f"{key} must be false in {CONFIG}, got true: it is not read"
            )
    act_fn = cfg.word("act_fn", ("relu", "topk", "jumprelu"))
    norm = cfg.word("norm_activation", NORMS)
    if norm == "inference" and act_fn == "jumprelu":
        raise DictionaryFormatError(
            "norm_activation must not be 'inference' for act_fn 'jumprelu', got it: the norm was "
            "folded without the thresholds; take the file from before"
        )
    norms = {name[len(NORM) :]: raw.pop(name) for name in list(raw) if name.startswith(NORM)}
    if files.stated.input_scale and not norms:
        norm_in = math.sqrt(cfg.whole("d_model")) / files.stated.input_scale
        norms = dict.fromkeys((cfg.word(key) for key in SITE), torch.tensor(norm_in))
    weights = in_memory(_weights(cfg, raw, act_fn), files.latents)
    if weights.threshold is not None:
        weights = replace(weights, threshold=rewrite.exp(weights.threshold))
    s_in, s_out = _scales(cfg, norm, norms, weights)
    config = SAEConfig(
        d_in=weights.d_in,
        d_sae=_d_sae(cfg),
        d_out=None if weights.d_out == weights.d_in else weights.d_out,
        activation=_activation(cfg, act_fn),
        b_in="none",
        input_scale=s_in,
        output_scale=s_out,
        input_norm="rms" if norm == "token-wise" else "none",
        gate_by_decoder_norm=cfg.flag("sparsity_include_decoder_norm"),
    )
    return Reading(config=config, weights=weights, site=cfg.texts(SITE))


def _weights(cfg: Fields, raw: dict[str, Tensor], act_fn: str) -> Weights:
    """The tensors in our orientation: W_E is stored as (d_in, d_sae), W_D as (d_sae, d_out)."""
    d_in = cfg.whole("d_model")
    d_sae = _d_sae(cfg)
    has_bias = cfg.flag("use_decoder_bias")
    wanted = {"W_E", "b_E", "W_D"} | ({"b_D"} if has_bias else set())
    expect_keys(raw, wanted | ({THRESHOLD} if act_fn == "jumprelu" else set()), WEIGHTS)
    d_out = raw["W_D"].shape[-1]
    shapes = {"W_E": (d_in, d_sae), "W_D": (d_sae, d_out), "b_D": (d_out,)}
    for name, tensor in raw.items():
        expect_shape(tensor, shapes.get(name, (d_sae,)), name)
    return Weights(
        enc_rows=raw["W_E"].T,
        dec_rows=raw["W_D"],
        b_enc=raw["b_E"],
        b_dec=raw["b_D"] if has_bias else raw["W_D"].new_zeros(d_out),
        threshold=raw[THRESHOLD] if act_fn == "jumprelu" else None,  # its logarithm, as yet
    )


def _d_sae(cfg: Fields) -> int:
    return int(cfg.whole("d_model") * cfg.number("expansion_factor"))


def _activation(cfg: Fields, act_fn: str) -> Activation:
    if act_fn == "topk":
        return TopK(k=cfg.whole("top_k"))
    return JumpReLU() if act_fn == "jumprelu" else ReLU()


def _scales(
    cfg: Fields, norm: str, norms: dict[str, Tensor], weights: Weights
) -> tuple[float, float]:
    """The two factors of a norm over the data set; they are in the file of weights."""
    site = [cfg.word(key) for key in SITE]
    if norm == "token-wise" and site[0] != site[1]:
        raise DictionaryFormatError(
            "norm_activation must not be 'token-wise' where hook points differ, got it: the norm "
            "of the row to predict is not known when the dictionary is applied"
        )
    if norm != "dataset-wise":
        return 1.0, 1.0
    missing = [name for name in site if name not in norms or float(norms[name]) <= 0]
    if missing:
        raise DictionaryFormatError(
            f"{WEIGHTS} must hold a positive {NORM}{missing[0]}, got {sorted(norms)}"
        )
    widths = (weights.d_in, weights.d_out)
    s_in, s_out = (math.sqrt(d) / float(norms[n]) for d, n in zip(widths, site, strict=True))
    return s_in, s_out
