"""Our own format: a directory with sae.safetensors, config.json and provenance.json."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from activations_cache import seals
from activations_cache.checks import DamagedFileError, MonosemaError
from sae.architecture import (
    B_IN,
    INPUT_NORMS,
    KINDS,
    Activation,
    SAEConfig,
    Slice,
)
from sae.autoencoder import SparseAutoencoder
from sae.pretrained.canonical import Reading, Weights, empty, in_memory
from sae.pretrained.files import Files
from sae.pretrained.foreign import DictionaryFormatError, Fields, one_line
from sae.read_out import ReadOut

FORMAT = "monosema"
CHECKED_AGAINST = "itself"
FORMAT_VERSION = 1
WEIGHTS = "sae.safetensors"
CONFIG = "config.json"
PROVENANCE = "provenance.json"
READ_OUT = "read_out.safetensors"
"""What the refined read-out needs, where it was set."""
CONFIG_KEYS = {
    "format", "format_version", "d_in", "d_sae", "d_out", "activation", "b_in", "input_scale",
}  # fmt: skip
LATER_KEYS = {
    "output_scale", "input_norm", "undo_norm", "gate_by_decoder_norm", "skip", "inputs", "outputs",
}  # fmt: skip
"""Files that were written before these existed have their defaults."""


def save(
    dictionary: SparseAutoencoder, path: str | Path, provenance: Mapping[str, object] | None = None
) -> Path:
    """Write a dictionary directory; each file is put in place whole, the config last.

    Args:
        dictionary: What is written, in fp32.
        path: The directory; files of an earlier dictionary in it are replaced.
        provenance: What made it (cache fingerprint, config, versions); recorded, never compared.
            The dictionary's own when absent.

    Raises:
        ValueError: If a number is not finite, such as the threshold of an untrained BatchTopK.
    """
    path = Path(path)
    state = dictionary.state_dict()
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise MonosemaError("a dictionary must hold finite numbers to be saved, got others")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    weights = to_safetensors(tensors)
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(dictionary.config)}
    if dictionary.config.undo_norm:  # files without the key are read by releases before it too
        del config["undo_norm"]
    made_by = dictionary.provenance if provenance is None else provenance
    record = {**made_by, "sae_sha256": hashlib.sha256(weights).hexdigest()}
    seals.write(path, {WEIGHTS: weights, PROVENANCE: _json(record)})
    if dictionary.read_out is not None:
        save_read_out(dictionary.read_out, path, str(record["sae_sha256"]))
    elif (path / READ_OUT).is_file():
        seals.remove(path, [READ_OUT])
    seals.write(path, {CONFIG: _json(config)})
    return path


def save_read_out(read_out: ReadOut, directory: Path, weights_sha256: str) -> Path:
    """Write what the refined read-out needs beside a dictionary, with the hash of its weights."""
    known = {"margin": repr(read_out.margin), "made_from": json.dumps(dict(read_out.made_from))}
    data = to_safetensors(
        {"tau": read_out.tau.detach().float().cpu().contiguous()},
        {**known, "sae_sha256": weights_sha256},
    )
    seals.write(directory, {READ_OUT: data})
    return directory / READ_OUT


def load_read_out(directory: Path, weights_sha256: str) -> ReadOut | None:
    """Read what `save_read_out` wrote; None where there is nothing.

    Raises:
        DictionaryFormatError: If it is damaged, or was made for other weights.
    """
    path, again = directory / READ_OUT, "run `sae refine` again"
    if not path.is_file():
        return None
    try:
        seals.require_whole(path, advice=again)
    except DamagedFileError as error:
        raise DictionaryFormatError(str(error)) from error
    try:
        with safe_open(path, framework="pt") as file:
            known, tau = file.metadata() or {}, file.get_tensor("tau")
        made_from = json.loads(known.get("made_from", "{}"))
        read_out = ReadOut(tau=tau, margin=float(known.get("margin", "nan")), made_from=made_from)
    except (SafetensorError, ValueError) as error:
        raise DictionaryFormatError(
            f"{path} must be a refined read-out, got: {one_line(error)}; {again}"
        ) from error
    if known.get("sae_sha256") != weights_sha256:
        raise DictionaryFormatError(
            f"{path} must be made for the weights of the dictionary (sha256 {weights_sha256}), got "
            f"{known.get('sae_sha256')}; {again}"
        )
    return read_out


def fits(files: Files) -> bool:
    """Whether the config is there and names a format."""
    return files.has(CONFIG) and "format" in files.json(CONFIG)


def read(files: Files) -> Reading:
    """Read a dictionary directory of our own format.

    Raises:
        DictionaryFormatError: If a file is missing or damaged, or keys, shapes or values are
            not those of the config.
    """
    provenance = _require_whole(files)
    config = _config(files)
    expected = {name: tuple(p.shape) for name, p in empty(config).state_dict().items()}
    tensors = files.tensors(WEIGHTS)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    where = files.root / WEIGHTS
    if found != expected:
        raise DictionaryFormatError(f"{where} must hold {expected} (from {CONFIG}), got {found}")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise DictionaryFormatError(
                f"{where} must hold float32 numbers, got {tensor.dtype} in {name!r}"
            )
    weights = in_memory(Weights(**tensors), files.latents)
    return Reading(config=config, weights=weights, provenance=provenance)


def _require_whole(files: Files) -> dict[str, object]:
    """Compare the files with their list and the weights with their hash; return the provenance."""
    try:
        for name in (CONFIG, PROVENANCE, WEIGHTS):
            if files.has_sibling(name):
                seals.require_whole(files.root / name)
    except DamagedFileError as error:
        raise DictionaryFormatError(str(error)) from error
    provenance = files.json(PROVENANCE) if files.has_sibling(PROVENANCE) else {}
    expected = provenance.get("sae_sha256")
    if expected is not None and files.has_sibling(WEIGHTS):
        digest = seals.sha256(files.root / WEIGHTS)
        if digest != expected:
            raise DictionaryFormatError(
                f"{files.root / WEIGHTS} must have the sha256 of {PROVENANCE}, {expected}, got "
                f"{digest}; it is damaged or another one: copy it again"
            )
    return provenance


def _config(files: Files) -> SAEConfig:
    file, record = files.root / CONFIG, files.json(CONFIG)
    if set(record) - LATER_KEYS != CONFIG_KEYS:
        raise DictionaryFormatError(
            f"{file} must have the keys {sorted(CONFIG_KEYS)}, got {sorted(record)}"
        )
    version = record["format_version"]
    if type(version) is not int or version != FORMAT_VERSION or record["format"] != FORMAT:
        raise DictionaryFormatError(
            f"{file} must be format {FORMAT!r} version {FORMAT_VERSION}, got "
            f"{record['format']!r} version {record['format_version']!r}; update monosema"
        )
    cfg = Fields(record, str(file))
    try:
        return SAEConfig(
            d_in=cfg.whole("d_in"),
            d_sae=cfg.whole("d_sae"),
            d_out=cfg.whole("d_out") if "d_out" in cfg else None,
            activation=_activation(cfg.part("activation")),
            b_in=cfg.word("b_in", B_IN),  # pyright: ignore[reportArgumentType]
            input_scale=cfg.number("input_scale"),
            output_scale=cfg.number("output_scale") if "output_scale" in cfg else None,
            input_norm=cfg.word("input_norm", INPUT_NORMS, "none"),  # pyright: ignore[reportArgumentType]
            undo_norm=cfg.flag("undo_norm", True),
            gate_by_decoder_norm=cfg.flag("gate_by_decoder_norm", False),
            skip=cfg.flag("skip", False),
            inputs=_slices(cfg, "inputs"),
            outputs=_slices(cfg, "outputs"),
        )
    except ValueError as error:
        raise DictionaryFormatError(f"{file} must describe a dictionary, got: {error}") from error


def _slices(cfg: Fields, key: str) -> tuple[Slice, ...]:
    found = []
    for part in cfg.parts(key):
        part.only(field.name for field in fields(Slice))
        point, scale = part.word("hook_point"), part.number("scale")
        found.append(Slice(hook_point=point, width=part.whole("width"), scale=scale))
    return tuple(found)


def _activation(cfg: Fields) -> Activation:
    kind = KINDS[cfg.word("kind", KINDS)]
    cfg.only(field.name for field in fields(kind))
    given: dict[str, Any] = {
        field.name: cfg.whole(field.name) if field.type is int else cfg.number(field.name)
        for field in fields(kind)
        if field.name != "kind"
    }
    return kind(**given)


def _json(record: Mapping[str, object]) -> bytes:
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()
