"""An ONNX export of DINOv2 becomes a directory in transformers' format.

PyTorch's exporter keeps the names of most weights. The matrices of linear layers lose theirs and
are transposed; the nodes that use them still say which layer they belong to.
"""

import importlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from activations_cache.gguf import Save
from activations_cache.loading import Refusing
from activations_cache.locations import require_reader
from monosema.checks import MonosemaError

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


def read(path: Path) -> Save:
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
    found = {
        entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy())
        for entry in graph.initializer
    }
    prefix = next((n.removesuffix(_FIRST) for n in found if n.endswith(_FIRST)), None)
    if prefix is None:
        raise MonosemaError(f"no weight {_FIRST}")
    weights = {n.removeprefix(prefix): w for n, w in found.items() if n.startswith(prefix)}
    matrices = dict(_matrices(graph, f"/{prefix.replace('.', '/')}", found))
    weights |= {name: found[own].T.contiguous() for name, own in matrices.items()}
    d_model = weights[_FIRST].shape[2]
    loose = [w for n, w in found.items() if n.startswith(_UNNAMED) and n not in matrices.values()]
    of_class, of_patches = sorted(_grids(loose, d_model), key=lambda w: w.shape[1])
    weights["embeddings.position_embeddings"] = torch.cat([of_class, of_patches], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, d_model)  # only training reads it
    return weights


def _matrices(graph: Any, prefix: str, found: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield the name of each linear layer's matrix, and its name in the file."""
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith(prefix) and node.input[1] in found:
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
