"""Gemma Scope 1 (params.npz) and 2 (config.json and params.safetensors): JumpReLU, folded norms."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.architecture import JumpReLU, SAEConfig, Slice
from sae.pretrained import rewrite
from sae.pretrained.canonical import Reading, Weights, in_memory
from sae.pretrained.files import Files, expect_keys, expect_shape
from sae.pretrained.foreign import DictionaryFormatError, Fields

FORMAT = "gemma_scope"
CHECKED_AGAINST = "the published tutorials' code"
ARRAYS = "params.npz"
CONFIG = "config.json"
WEIGHTS = "params.safetensors"
TENSORS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
SKIP = "affine_skip_connection"
KEYS = {
    "hf_hook_point_in", "hf_hook_point_out", "width", "model_name", "architecture", "l0",
    "affine_connection", "type",
}  # fmt: skip
IN_PATH = {
    "release": re.compile(r"(gemma-scope-[\w.-]+)"),
    "layer": re.compile(r"/layer_(\d+)[/_]"),
    "width": re.compile(r"[/_]width_(\d+[km])(?![^/_])"),
    "average_l0": re.compile(r"/average_l0_(\d+)"),
}
SIDES = {"output": ":out", "input": ":in"}
WIDTH = re.compile(r"(\d+)([km])")
HOOK_IN, HOOK_OUT = "hf_hook_point_in", "hf_hook_point_out"
SITE = ("model_name", HOOK_IN, HOOK_OUT, "type", "l0")


def fits(files: Files) -> bool:
    """Whether the files are there."""
    return files.has(ARRAYS) or files.has(WEIGHTS)


def read(files: Files) -> Reading:
    """Read a dictionary of Gemma Scope, 1 or 2, whichever file is there.

    Raises:
        DictionaryFormatError: If something is missing or unknown, or if d_in = d_sae leaves the
            orientation to the file's name alone and the format was not named.
    """
    if files.has(ARRAYS) == files.has(WEIGHTS):
        raise DictionaryFormatError(f"{files.path} must hold {ARRAYS} or {WEIGHTS}, one of them")
    is_first = files.has(ARRAYS)
    raw = files.arrays(ARRAYS) if is_first else files.tensors(WEIGHTS)
    raw = {_lower(name): tensor for name, tensor in raw.items()}
    done = _drop_unit_factor(raw) if is_first else []
    cfg = Fields({} if is_first or not files.has_sibling(CONFIG) else files.json(CONFIG), CONFIG)
    _check(cfg, raw)
    d_in, d_sae = raw["w_enc"].shape[0], len(raw["b_enc"])
    if not cfg.record and d_in == d_sae and not files.is_named:
        raise DictionaryFormatError(
            f"w_enc must show its orientation by its shape, got {(d_in, d_sae)} and no {CONFIG}; "
            f"name the format by format={FORMAT!r} if rows are of d_in"
        )
    stored = Weights(
        enc_rows=raw["w_enc"].T,
        dec_rows=raw["w_dec"],
        b_enc=raw["b_enc"],
        b_dec=raw["b_dec"],
        threshold=raw["threshold"],
        skip_rows=raw[SKIP].T if SKIP in raw else None,
    )
    weights = rewrite.threshold_of_relu(in_memory(stored, files.latents), done)
    config = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        d_out=None if weights.d_out == d_in else weights.d_out,
        activation=JumpReLU(),
        b_in="none",
        skip=SKIP in raw,
        **slices(hook_points(cfg, HOOK_IN), hook_points(cfg, HOOK_OUT), d_in, weights.d_out),
    )
    site = site_of(files.path, d_sae) | cfg.texts(SITE)
    return Reading(config=config, weights=weights, folds=tuple(done), site=site)


LISTED = re.compile(r"\{([\d,]+)\}")


def hook_points(cfg: Fields, key: str, n_layers: int = 1) -> tuple[str, ...]:
    """Hook points in our words, one per layer; empty where the config does not tell them.

    "model.layers.17.output" becomes "model.layers.17:out"; "{all}" and "{5,9}" stand for layers.
    """
    said = cfg.word(key, default="")
    listed = LISTED.search(said)
    layers = listed[1].split(",") if listed else [str(i) for i in range(n_layers)]
    path, _, side = said.rpartition(".")
    if side not in SIDES or len(layers) != n_layers:
        return ()
    pattern = LISTED.sub("{all}", path)
    return tuple(pattern.replace("{all}", layer) + SIDES[side] for layer in layers)


def site_of(path: Path, d_sae: int) -> dict[str, str]:
    """What the path of the release says: release, layer, width and L0.

    Raises:
        DictionaryFormatError: If the width in the path is not that of the weights.
    """
    parts = path.absolute().as_posix()
    results = {key: match[1] for key, p in IN_PATH.items() if (match := p.search(parts))}
    width = WIDTH.fullmatch(results.get("width", ""))
    if width and round(d_sae / (1 << {"k": 10, "m": 20}[width[2]])) not in _near(int(width[1])):
        raise DictionaryFormatError(
            f"the path must have the width of the weights, {d_sae:,}, got {results['width']}"
        )
    return results


def slices(
    read: tuple[str, ...], predicted: tuple[str, ...], d_in: int, width: int
) -> dict[str, Any]:
    """The config's `inputs` and `outputs`, rows of each hook point d_in and `width` wide."""
    if not read or not predicted:
        return {}
    inputs = tuple(Slice(hook_point=point, width=d_in) for point in read)
    outputs = tuple(Slice(hook_point=point, width=width) for point in predicted)
    return {"inputs": inputs} | ({} if inputs == outputs else {"outputs": outputs})


def _near(width: int) -> tuple[int, ...]:
    """What 65k may be: 65,000 rounded from 65,536 is 64 * 1024."""
    return width, round(width * 1000 / 1024)


def _lower(name: str) -> str:
    return {"W_enc": "w_enc", "W_dec": "w_dec"}.get(name, name)


def _drop_unit_factor(raw: dict[str, Tensor]) -> list[str]:
    factor = raw.pop("scaling_factor", None)
    if factor is None:
        return []
    if not bool((factor == 1).all()):
        raise DictionaryFormatError(f"scaling_factor must be all ones in {ARRAYS}, got others")
    return ["scaling_factor of ones dropped"]


def _check(cfg: Fields, raw: dict[str, Tensor]) -> None:
    """Keys and shapes; w_enc is (d_in, d_sae), w_dec (d_sae, d_out), the skip (d_in, d_out)."""
    cfg.only(KEYS)
    expect_keys(raw, TENSORS, "the file", frozenset({SKIP}))
    if cfg.record:
        cfg.word("architecture", ("jump_relu",))
        if cfg.flag("affine_connection", SKIP in raw) != (SKIP in raw):
            raise DictionaryFormatError(
                f"affine_connection must say whether there is {SKIP}, got "
                f"{cfg.record['affine_connection']} in {CONFIG}"
            )
    d_sae, d_out = raw["b_enc"].numel(), raw["b_dec"].numel()
    if "width" in cfg and cfg.whole("width") != d_sae:
        raise DictionaryFormatError(f"width must be {d_sae} in {CONFIG}, got {cfg.whole('width')}")
    d_in = raw["w_enc"].shape[0]
    expect_shape(raw["w_enc"], (d_in, d_sae), "w_enc")
    expect_shape(raw["w_dec"], (d_sae, d_out), "w_dec")
    expect_shape(raw["threshold"], (d_sae,), "threshold")
    if SKIP in raw:
        expect_shape(raw[SKIP], (d_in, d_out), SKIP)
