"""The hook points that a model offers: residual in and out of each block, attention, MLP.

Names of modules differ between families and between versions of transformers, so they are found in
the model at hand and not spelled from its configuration.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class BlockParts:
    """Where a block keeps its attention and its MLP, as module paths inside the block."""

    attention: str
    """Its output is what the attention adds to the stream, before any norm or scale after it."""
    mlp_in: str
    """The module that first reads the MLP's input."""
    mlp_out: str
    """The module whose output is the MLP's."""


FAMILIES = (
    BlockParts("attention.output.dense", "intermediate", "output.dense"),  # BERT, RoBERTa
    BlockParts("self_attn", "mlp", "mlp"),  # Llama, Mistral, Qwen, Gemma, CLIP, SigLIP
    BlockParts("attention", "mlp", "mlp"),  # GPT-NeoX, ViT, DINOv2
    BlockParts("attn", "mlp", "mlp"),  # GPT-2, timm, open_clip
)
"""Of these the first counts whose modules a block has all; one entry adds a family."""


def sites(model: nn.Module) -> list[str]:
    """Return the hook points of a model, block by block, in the order in which they are passed.

    For each block: `B:in`, attention `:out`, MLP `:in`, MLP `:out`, `B:out`. A block of a family
    that is not known has its `in` and `out` alone.

    Args:
        model: A transformer: a language model or a vision tower.

    Raises:
        ValueError: If the model has no list of blocks.
    """
    path, blocks = blocks_of(model)
    prefix = f"{path}." if path else ""
    return [point for i, block in enumerate(blocks) for point in _points(f"{prefix}{i}", block)]


def blocks_of(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Return the blocks of a transformer and the module path of their list.

    They are the longest list of modules of one class that is not inside another list, as the
    experts of a block are.

    Raises:
        ValueError: If the model has no such list.
    """
    lists = {
        path: list(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and not any(part.isdigit() for part in path.split("."))
        and len({type(child) for child in module}) == 1
    }
    if not lists:
        raise ValueError(f"model must have a list of blocks, got none in {type(model).__name__}")
    path = max(lists, key=lambda name: len(lists[name]))
    return path, lists[path]


def _points(path: str, block: nn.Module) -> Iterator[str]:
    modules = dict(block.named_modules())
    fits = (p for p in FAMILIES if {p.attention, p.mlp_in, p.mlp_out} <= modules.keys())
    yield f"{path}:in"
    if (parts := next(fits, None)) is not None:
        yield f"{path}.{parts.attention}:out"
        yield f"{path}.{parts.mlp_in}:in"
        yield f"{path}.{parts.mlp_out}:out"
    yield f"{path}:out"
