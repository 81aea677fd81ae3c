"""Vectors of a stream that need no dictionary: control arms for steering."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from activations_cache.hooks import capture


def stream_of(
    model: nn.Module, hook_point: str, inputs: Shaped[Tensor, "example ..."]
) -> Float[Tensor, "example pos d_model"]:
    """The stream at a hook point for token ids or pixels, for `Patch` and for means.

    Raises:
        ValueError: If the hook point is not one of the model.
    """
    with capture(model, [hook_point]) as run:
        return run(inputs.to(next(model.parameters()).device))[hook_point]


def mean_difference(
    model: nn.Module,
    hook_point: str,
    positives: Shaped[Tensor, "example ..."],
    negatives: Shaped[Tensor, "_example ..."],
    *,
    first_position: int = 1,
) -> Float[Tensor, " d_model"]:
    """Mean row of some texts less that of others: the vector of contrastive activation addition.

    Args:
        model: The model.
        hook_point: Where its stream is read.
        positives: Token ids of texts with what the vector shall stand for, of one length.
        negatives: Of texts without it; another length is fine.
        first_position: Positions below this one, the attention sinks, do not count.
    """
    means = [
        stream_of(model, hook_point, ids)[:, first_position:].float().mean(dim=(0, 1))
        for ids in (positives, negatives)
    ]
    return means[0] - means[1]


def random_direction(
    like: Float[Tensor, " d_model"], generator: torch.Generator
) -> Float[Tensor, " d_model"]:
    """A random vector with the norm of another one, uniform over directions."""
    found = torch.randn(like.shape, generator=generator).to(like)
    return found / found.norm() * like.norm()
