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
from torch import Tensor

from activations_cache import io
from sae.architecture import Activation, BatchTopK, JumpReLU, ReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder

FORMAT = "monosema"
FORMAT_VERSION = 1
WEIGHTS = "sae.safetensors"
CONFIG = "config.json"
PROVENANCE = "provenance.json"
CONFIG_KEYS = {
    "format", "format_version", "d_in", "d_sae", "d_out", "activation", "b_in", "input_scale",
}  # fmt: skip
MAX_CONFIG_BYTES = 1 << 20
KINDS: dict[str, type[Activation]] = {
    "relu": ReLU,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "jumprelu": JumpReLU,
}


class DictionaryFormatError(ValueError):
    """A dictionary on disk that is missing, damaged or not what it says."""


def save(
    dictionary: SparseAutoencoder, path: str | Path, provenance: Mapping[str, object] | None = None
) -> Path:
    """Write a dictionary directory; each file is put in place whole, the config last.

    Args:
        dictionary: What is written, in fp32.
        path: The directory; files of an earlier dictionary in it are replaced.
        provenance: What made it (cache fingerprint, config, versions); recorded, never compared.

    Raises:
        ValueError: If a number is not finite, such as the threshold of an untrained BatchTopK.
    """
    path = Path(path)
    state = dictionary.state_dict()
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise ValueError("a dictionary must hold finite numbers to be saved, got others")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    weights = to_safetensors(tensors)
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(dictionary.config)}
    record = {**(provenance or {}), "sae_sha256": hashlib.sha256(weights).hexdigest()}
    io.write_files({path / WEIGHTS: weights, path / PROVENANCE: _json(record)})
    io.write_files({path / CONFIG: _json(config)})
    return path


def read(path: Path, latents: slice | None = None) -> SparseAutoencoder:
    """Read a dictionary directory of our own format, or a slice of its latents.

    Raises:
        DictionaryFormatError: If a file is missing or damaged, or keys, shapes or values are
            not those of the config.
    """
    config = _read_config(path)
    expected = {name: tuple(p.shape) for name, p in _empty(config).state_dict().items()}
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != expected:
                raise DictionaryFormatError(
                    f"{path / WEIGHTS} must hold {expected} (from {CONFIG}), got {found}"
                )
            tensors = {name: _part(file, name, latents) for name in expected}
    except FileNotFoundError as error:
        raise DictionaryFormatError(f"{path} must hold {WEIGHTS}, got none") from error
    except SafetensorError as error:
        raise DictionaryFormatError(
            f"{path / WEIGHTS} must be a whole safetensors file, got: {error}; copy it again"
        ) from error
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise DictionaryFormatError(
                f"{path / WEIGHTS} must hold finite float32 numbers, got others in {name!r}"
            )
    dictionary = _empty(_narrowed(config, len(tensors["b_enc"])))
    dictionary.load_state_dict(tensors, assign=True)
    return dictionary


def _part(file: safe_open, name: str, latents: slice | None) -> Tensor:
    is_scalar = not file.get_slice(name).get_shape()
    if latents is None or name == "b_dec" or is_scalar:
        return file.get_tensor(name)
    return file.get_slice(name)[latents].contiguous()


def _narrowed(config: SAEConfig, d_sae: int) -> SAEConfig:
    activation = config.activation
    if d_sae < config.d_sae and isinstance(activation, TopK | BatchTopK):
        activation = type(activation)(k=min(activation.k, max(d_sae, 1)))
    return SAEConfig(**{**_fields(config), "d_sae": d_sae, "activation": activation})


def _fields(config: SAEConfig) -> dict:
    return {name: getattr(config, name) for name in SAEConfig.__dataclass_fields__}


def _empty(config: SAEConfig) -> SparseAutoencoder:
    with torch.device("meta"):
        return SparseAutoencoder(config)


def _read_config(path: Path) -> SAEConfig:
    file = path / CONFIG
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise DictionaryFormatError(f"{file} must be at most 1 MiB, got {file.stat().st_size}")
        record = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DictionaryFormatError(f"{file} must be readable JSON, got: {error}") from error
    if not isinstance(record, dict) or set(record) != CONFIG_KEYS:
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise DictionaryFormatError(f"{file} must have the keys {sorted(CONFIG_KEYS)}, got {keys}")
    if record["format_version"] != FORMAT_VERSION or record["format"] != FORMAT:
        raise DictionaryFormatError(
            f"{file} must be format {FORMAT!r} version {FORMAT_VERSION}, got "
            f"{record['format']!r} version {record['format_version']!r}; update monosema"
        )
    fields = {k: v for k, v in record.items() if not k.startswith("format")}
    try:
        return SAEConfig(**{**fields, "activation": _activation(fields["activation"])})
    except (TypeError, ValueError) as error:
        raise DictionaryFormatError(f"{file} must describe a dictionary, got: {error}") from error


def _activation(record: Mapping[str, object]) -> Activation:
    kind = KINDS.get(str(record.get("kind")))
    wanted = {} if kind is None else {f.name: f.type for f in fields(kind) if f.name != "kind"}
    given: dict[str, Any] = {name: value for name, value in record.items() if name != "kind"}
    fit = all(
        isinstance(given.get(name), int if of is int else int | float)
        and not isinstance(given.get(name), bool)
        for name, of in wanted.items()
    )
    if kind is None or given.keys() != wanted.keys() or not fit:
        raise ValueError(f"activation must be a known kind with its fields, got {record}")
    return kind(**given)


def _json(record: Mapping[str, object]) -> bytes:
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()
