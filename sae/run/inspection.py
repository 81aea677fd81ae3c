"""What a dictionary of any format is, and how it is applied, in words."""

from pathlib import Path

import torch

from sae import pretrained
from sae.architecture import Gated, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.run.context import Facts


def inspect(path: str | Path, *, format: str | None = None, allow_pt: bool = False) -> Facts:
    """Say what a dictionary is, where it comes from, and how it will be applied.

    Args:
        path: A directory, a file or org/name.
        format: Where two fit.
        allow_pt: Read a pickle in a closed process.
    """
    dictionary, source, _ = pretrained.load_with_source(path, format, allow_pt)
    config = dictionary.config
    rows = [
        ("format", source.source_format),
        ("its reader", f"checked against {source.checked_against}; not run on released weights"),
        *(("sha256", f"{name} {digest[:16]}") for name, digest in source.source_sha256.items()),
        *((name.replace("_", " "), text) for name, text in source.site.items()),
        ("latents", f"{config.d_sae:,}"),
        ("width", f"{config.d_in:,} -> {config.width_out:,}"),
        *_hook_points(config),
        *((name, _range(tensor)) for name, tensor in _tensors(dictionary).items()),
        *(("folded", fold) for fold in source.folds_applied),
        *equations_of(config),
    ]
    return Facts(str(path), rows, "u, h, a, y, x_hat: how it is applied")


def _hook_points(config: SAEConfig) -> list[tuple[str, str]]:
    """What is read and, if it is something else, what is predicted; nothing if not recorded."""
    sides = {"reads": config.inputs, "predicts": config.outputs}
    return [
        (side, ", ".join(p.hook_point for p in parts)) for side, parts in sides.items() if parts
    ]


def equations_of(config: SAEConfig) -> list[tuple[str, str]]:
    """How the dictionary is applied: the left and the right side of each equation."""
    norm = {"none": "x", "layer_norm": "layer_norm(x)", "rms": "x / rms(x)"}[config.input_norm]
    scaled = norm if config.input_scale == 1 else f"{norm} * {config.input_scale:.6g}"
    scaled += "" if len(config.slices_in) == 1 else " * each hook point's own factor"
    centred = "u" if config.b_in == "none" else f"(u - {config.b_in.replace('own', 'b_in')})"
    through = "u" if config.undo_norm else "x" + scaled.removeprefix(norm)
    y = "a @ W_dec + b_dec" + (f" + {through} @ W_skip" if config.skip else "")
    brought = "y" if config.scale_out == 1 else f"y / {config.scale_out:.6g}"
    brought += "" if len(config.slices_out) == 1 else " / each hook point's own factor"
    undone = {"none": "", "layer_norm": " * std(x) + mean(x)", "rms": " * rms(x)"}
    brought += undone[config.input_norm] if config.undo_norm else ""
    bias = "" if isinstance(config.activation, Gated) else " + b_enc"
    return [
        ("u", scaled),
        ("h", f"{centred} @ W_enc{bias}"),
        ("a", _activation(config)),
        ("y", y),
        ("x_hat", brought),
    ]


def _activation(config: SAEConfig) -> str:
    h = "h * |W_dec|" if config.gate_by_decoder_norm else "h"
    facts, k = config.activation.facts, config.activation.per_row
    text = facts.equation.format(h=h, k=k)
    return f"({text}) / |W_dec|" if config.gate_by_decoder_norm else text


def _tensors(dictionary: SparseAutoencoder) -> dict[str, torch.Tensor]:
    """What tells a wrong reading by its range."""
    tensors = {
        "norms of decoder rows": dictionary.W_dec.norm(dim=1),
        "norms of encoder rows": dictionary.W_enc.norm(dim=0),
        "norm of b_dec": dictionary.b_dec.detach().norm(),
    }
    if dictionary.threshold is not None:
        tensors["threshold"] = dictionary.threshold.detach()
    return tensors


def _range(tensor: torch.Tensor) -> str:
    low, high = float(tensor.min()), float(tensor.max())
    return f"{low:.4g}" if tensor.dim() == 0 else f"{low:.4g} to {high:.4g}"
