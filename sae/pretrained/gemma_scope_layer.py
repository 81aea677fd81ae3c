"""Gemma Scope 2, cross-layer transcoders and crosscoders: params_layer_N.safetensors each.

One file holds the latents that read source layer N and what they write to every layer; the whole
is the sum of what its files give. So one file loads as a transcoder from d to n_layers * d.
"""

import re
from typing import Any

import torch
from torch import Tensor

from sae.architecture import JumpReLU, SAEConfig
from sae.pretrained import rewrite
from sae.pretrained.canonical import Reading, Weights, in_memory
from sae.pretrained.files import Files, expect_keys, expect_shape
from sae.pretrained.foreign import DictionaryFormatError, Fields
from sae.pretrained.gemma_scope import (
    CONFIG,
    HOOK_IN,
    HOOK_OUT,
    KEYS,
    SITE,
    SKIP,
    TENSORS,
    hook_points,
    site_of,
    slices,
)

FORMAT = "gemma_scope_layer"
CHECKED_AGAINST = "circuit-tracer's reader of this release, read"
FILE = re.compile(r"params_layer_(\d+)\.safetensors")
KINDS = ("clt", "crosscoder")


def fits(files: Files) -> bool:
    """Whether it is a file of one source layer, or the directory of such."""
    return bool(FILE.fullmatch(files.path.name)) or files.has("params_layer_0.safetensors")


def read(files: Files) -> Reading:
    """Read the latents of one source layer; their output is all layers' rows side by side.

    Raises:
        DictionaryFormatError: For a directory, if something is missing or unknown, or if it is not
            known whether layers before the source are written to.
    """
    match = FILE.fullmatch(files.path.name)
    if match is None:
        raise DictionaryFormatError(
            f"{files.path} must be one file, for it has one dictionary per source layer, got the "
            f"directory; pass {files.path / 'params_layer_0.safetensors'} or another of them"
        )
    layer = int(match[1])
    raw = files.tensors(files.path.name)
    expect_keys(raw, TENSORS, files.path.name, frozenset({SKIP}))
    d_in, d_sae, n_layers = _sizes(raw, layer)
    cfg = Fields(files.json(CONFIG) if files.has_sibling(CONFIG) else {}, CONFIG)
    kind = _kind(cfg, files, d_sae * n_layers)
    if d_in == d_sae and not (cfg.record or files.is_named):
        raise DictionaryFormatError(
            f"w_enc must show its orientation by its shape, got {(d_in, d_sae)} and no {CONFIG}; "
            f"name the format by format={FORMAT!r} if rows are of d_in"
        )
    done: list[str] = []
    stored = Weights(
        enc_rows=raw["w_enc"].T,
        dec_rows=raw["w_dec"].flatten(1),
        b_enc=raw["b_enc"],
        b_dec=_at(raw["b_dec"], layer, n_layers),
        threshold=raw["threshold"],
        skip_rows=_at(raw[SKIP].T, layer, n_layers) if SKIP in raw else None,
    )
    weights = rewrite.threshold_of_relu(in_memory(stored, files.latents), done)
    _check_causal(weights.dec_rows[:, : layer * d_in], kind, done)
    config = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        d_out=n_layers * d_in,
        activation=JumpReLU(),
        b_in="none",
        skip=SKIP in raw,
        **_slices(cfg, layer, n_layers, d_in),
    )
    where = {"source_layer": str(layer), "output": f"{n_layers} layers of {d_in} side by side"}
    site = site_of(files.path, d_sae * n_layers) | cfg.texts(SITE) | where
    return Reading(config=config, weights=weights, folds=tuple(done), site=site)


def _slices(cfg: Fields, layer: int, n_layers: int, d: int) -> dict[str, Any]:
    read, predicted = hook_points(cfg, HOOK_IN, n_layers), hook_points(cfg, HOOK_OUT, n_layers)
    return slices(read[layer : layer + 1], predicted, d, d)


def _sizes(raw: dict[str, Tensor], layer: int) -> tuple[int, int, int]:
    """d, d_sae and the number of layers; w_dec is stored as (d_sae, n_layers, d)."""
    d_in, d_sae = raw["b_dec"].numel(), raw["b_enc"].numel()
    n_layers = raw["w_dec"].shape[1] if raw["w_dec"].dim() == 3 else 1
    shapes = {"w_enc": (d_in, d_sae), "w_dec": (d_sae, n_layers, d_in), "b_dec": (d_in,)}
    for name, tensor in raw.items():
        expect_shape(tensor, (shapes | {SKIP: (d_in, d_in)}).get(name, (d_sae,)), name)
    if layer >= n_layers:
        raise DictionaryFormatError(
            f"the source layer must be below the number of layers {n_layers}, got {layer}"
        )
    return d_in, d_sae, n_layers


def _kind(cfg: Fields, files: Files, width: int) -> str:
    """'clt' or 'crosscoder', from the config or from a directory's name; '' where none says."""
    if not cfg.record:
        return next((kind for kind in KINDS if kind in files.path.parts), "")
    cfg.only(KEYS)
    cfg.word("architecture", ("jump_relu",))
    if cfg.whole("width") != width:
        raise DictionaryFormatError(
            f"width must be that of all source layers, {width}, in {CONFIG}, got "
            f"{cfg.whole('width')}"
        )
    return cfg.word("type", KINDS)


def _at(part: Tensor, layer: int, n_layers: int) -> Tensor:
    """The tensor in its layer's place, zeros in the others': each file has its own layer's bias."""
    zeros = torch.zeros_like(part)
    return torch.cat([part if i == layer else zeros for i in range(n_layers)])


def _check_causal(before: Tensor, kind: str, done: list[str]) -> None:
    """A transcoder writes to its own layer and later ones; set what it has for others to 0."""
    if kind == "crosscoder" or not bool(before.any()):
        return
    if kind != "clt":
        raise DictionaryFormatError(
            f"w_dec must be 0 for layers before the source where no {CONFIG} says whether it is of "
            f"a {' or a '.join(KINDS)}, got others; put the release's {CONFIG} beside it"
        )
    before.zero_()
    done.append("what the decoder has for layers before the source dropped")
