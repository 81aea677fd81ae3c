"""Model files of other formats become directories in transformers' format, once.

Reading a GGUF takes several times as long as reading safetensors, and a model read so cannot be
saved. The directory lies in the user's cache under the hash of the file:
`models/<sha256>/{config.json, model.safetensors, tokenizer.json, ..., manifest.json}`. It appears
under that name complete or not at all.

Of ONNX files the exports of DINOv2 are read. PyTorch's exporter keeps the names of most weights.
The matrices of linear layers lose theirs and are transposed; the nodes that use them still say
which layer they belong to.
"""

import hashlib
import importlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from activations_cache import io
from activations_cache.checks import Progress, require_reader, silent
from activations_cache.loading import Refusing, quiet
from monosema.checks import MonosemaError

_MANIFEST = "manifest.json"
_WAIT_S = 1800.0

Save = Callable[[Path], None]
"""Writes what was read from a file into a directory."""

Read = Callable[[Path], Save]
"""Reads a file of another format."""

_log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """Return the user's cache: $MONOSEMA_CACHE, $XDG_CACHE_HOME/monosema, or ~/.cache/monosema."""
    if folder := os.environ.get("MONOSEMA_CACHE"):
        return Path(folder)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "monosema"


def converted(
    path: Path, sha256: str, *, read: Read | None = None, progress: Progress | None = None
) -> Path:
    """Return the directory with what a file holds: of a GGUF bfloat16 safetensors and tokenizer.

    The first call converts; a second process that asks meanwhile waits for it. An interrupted or
    damaged conversion is made again.

    Args:
        path: The file.
        sha256: Its hash, which names the directory.
        read: Reads the file; absent for a GGUF.
        progress: Called for each step of a conversion.

    Raises:
        ModelError: If the file cannot be read.
        MissingPackageError: If a package for reading it is missing.
    """
    models = cache_directory() / "models"
    target = models / sha256
    if is_complete(target):
        return target
    io.make_directory(models)
    with io.lock(models / f"{sha256}.lock", f"the conversion of {path.name}", wait_s=_WAIT_S):
        if not is_complete(target):
            _convert(path, target, read or _read_gguf, progress or silent)
    return target


def is_complete(directory: Path) -> bool:
    """Whether the directory holds every file of its manifest with the hash that stands there."""
    try:
        files = json.loads((directory / _MANIFEST).read_bytes())["files"]
        return all(_sha256(directory / name) == digest for name, digest in files.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return False


def _convert(path: Path, target: Path, read: Read, progress: Progress) -> None:
    _log.info("converting %s to %s, once", path.name, target)
    partial = target.with_name(f"{target.name}.partial")
    for leftover in (partial, target):
        shutil.rmtree(leftover, ignore_errors=True)
    progress(0, 3, "conversion steps")
    save = read(path)
    progress(1, 3, "conversion steps")
    io.make_directory(partial)
    save(partial)
    progress(2, 3, "conversion steps")
    _commit(partial, target)
    progress(3, 3, "conversion steps")


def _read_gguf(path: Path) -> Save:
    tokenizer, model = _read(path)

    def save(partial: Path) -> None:
        with quiet():
            tokenizer.save_pretrained(partial)
            model.save_pretrained(partial)

    return save


def _read(path: Path) -> tuple[Tokenizer, PreTrainedModel]:
    require_reader(path.name)
    refusing = Refusing(f"{path} must be a whole GGUF file", "fetch the file again")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise refusing.error(f"the first bytes {magic!r}")
    # Releases that can keep the weights packed must be told not to; older ones know no such thing.
    packed = getattr(transformers, "GgufConfig", None)
    options = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    where = {"gguf_file": path.name, "local_files_only": True}
    with refusing, quiet():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
        model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            path.parent, dtype=torch.bfloat16, output_loading_info=True, **where, **options
        )
        if report["missing_keys"]:
            raise refusing.error(f"no weights for {min(report['missing_keys'])}")
        return tokenizer, _saveable(model)


def _saveable(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same weights in a model that knows nothing of quantisation."""
    config = model.config
    config.__dict__.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    return plain


def _commit(partial: Path, target: Path) -> None:
    names = sorted(entry.name for entry in partial.iterdir())
    for name in names:
        descriptor = io.open_file(partial / name, os.O_RDONLY)
        io.fsync(descriptor)
        os.close(descriptor)
    manifest = {"files": {name: _sha256(partial / name) for name in names}}
    io.write_files({partial / _MANIFEST: json.dumps(manifest, indent=1).encode()})
    io.rename(partial, target)
    io.sync_directory(target.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_HEAD = 64
"""Width of an attention head in every DINOv2."""
_FIRST = "embeddings.cls_token"
_UNNAMED = "onnx::"
_PREPROCESSING = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

Weights = dict[str, Float[Tensor, "..."]]


def read_dinov2(path: Path) -> Save:
    """Read an ONNX file, to save config.json, model.safetensors and the settings for images.

    Args:
        path: The file; it must hold a DINOv2 backbone, and may hold a head, which is left out.

    Returns:
        A function that saves into a directory; float32.

    Raises:
        ModelError: If it is no such file.
        MissingPackageError: If the package onnx is missing.
    """
    require_reader(path.name)
    onnx = importlib.import_module("onnx")
    damaged = importlib.import_module("google.protobuf.message").DecodeError
    refusing = Refusing(f"{path} must be an ONNX export of DINOv2", "name another file")
    with refusing, path.open("rb") as file:
        try:
            graph = onnx.load(file, load_external_data=False).graph
        except damaged as error:
            raise refusing.error(str(error)) from error
        weights = _weights(graph, onnx.numpy_helper)
        config = _config(weights)

    def save(directory: Path) -> None:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        for name, entries in (("config", config), ("preprocessor_config", _PREPROCESSING)):
            (directory / f"{name}.json").write_text(json.dumps(entries, indent=2))

    return save


def _weights(graph: Any, numpy_helper: ModuleType) -> Weights:
    """Return the backbone's weights by the names that transformers gives them in files."""
    results = {
        entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy())
        for entry in graph.initializer
    }
    prefix = next((n.removesuffix(_FIRST) for n in results if n.endswith(_FIRST)), None)
    if prefix is None:
        raise MonosemaError(f"no weight {_FIRST}")
    weights = {n.removeprefix(prefix): w for n, w in results.items() if n.startswith(prefix)}
    matrices = dict(_matrices(graph, f"/{prefix.replace('.', '/')}", results))
    weights |= {name: results[stored].T.contiguous() for name, stored in matrices.items()}
    d_model = weights[_FIRST].shape[2]
    loose = [w for n, w in results.items() if n.startswith(_UNNAMED) and n not in matrices.values()]
    of_class, of_patches = sorted(_grids(loose, d_model), key=lambda w: w.shape[1])
    weights["embeddings.position_embeddings"] = torch.cat([of_class, of_patches], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, d_model)  # only training reads it
    return weights


def _matrices(graph: Any, prefix: str, results: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield the name of each linear layer's matrix, and its name in the file."""
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith(prefix) and node.input[1] in results:
            layer = node.name.removeprefix(prefix).removesuffix("/MatMul").replace("/", ".")
            yield f"{layer}.weight", node.input[1]


def _grids(loose: list[Tensor], d_model: int) -> list[Tensor]:
    return [w for w in loose if w.ndim == 3 and w.shape[0] == 1 and w.shape[2] == d_model]


def _config(weights: Weights) -> dict[str, object]:
    """Return config.json, as far as the shapes of the weights tell it."""
    kernel = weights["embeddings.patch_embeddings.projection.weight"]
    n_patches = weights["embeddings.position_embeddings"].shape[1] - 1
    blocks = {name.split(".")[2] for name in weights if name.startswith("encoder.layer.")}
    d_model, patch = kernel.shape[0], kernel.shape[2]
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": d_model,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": d_model // _HEAD,
        "mlp_ratio": weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // d_model,
        "image_size": math.isqrt(n_patches) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
    }
