"""What latents add to a logit straight to the end, past all later blocks.

Vectors of a stream that need no dictionary: control arms for steering.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from activations_cache.hooks import capture
from activations_cache.models import FINAL_NORMS
from sae.autoencoder import SparseAutoencoder
from sae.steer.attribution import Attribution, see
from sae.steer.edits import directions_of


@torch.no_grad()
def direct_logits(
    model: nn.Module,
    placed: SparseAutoencoder,
    input_ids: Int[Tensor, "example pos"],
    target: int,
    against: int | None = None,
) -> Attribution:
    """What each latent adds to a logit at its position past all later blocks, straight to the end.

    a_i norm'(d_i) . (U_target - U_against), where norm' is the final norm with the scale (and for
    a layer norm the centring) that it has at that token in the model as it is.

    Args:
        model: A causal language model in evaluation mode.
        placed: The dictionary and where it reads and writes; the place must lie on the residual.
        input_ids: One prompt.
        target: Token.
        against: Token whose logit is taken off.

    Raises:
        ValueError: If the model has no final norm under a known name or no output embedding.
    """
    base, name = _final_norm(model)
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    norm = base.get_submodule(name)
    path = next(path for path, module in model.named_modules() if module is norm)
    seen = see(model, placed, input_ids, 0)
    with capture(model, [f"{path}:in"], stop=False) as run:
        final = run(seen.ids)[f"{path}:in"][0].float()
    readout = head.weight[target] - (0.0 if against is None else head.weight[against])
    readout = readout.float()
    used = directions_of(placed, seen.latents.indices.flatten()).float()
    normed = _linear_norm(norm, used).view(*seen.latents.indices.shape, -1) @ readout
    scale = _spread(norm, final)[:, None]
    scores = seen.latents.values * seen.size * normed / scale
    return Attribution(
        seen.latents, scores, float(norm(final.to(head.weight))[-1].float() @ readout)
    )


def _final_norm(model: nn.Module) -> tuple[nn.Module, str]:
    base = getattr(model, "base_model", model)
    found = [name for name in FINAL_NORMS if isinstance(getattr(base, name, None), nn.Module)]
    if not found or getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(
            f"model must have an output embedding and a final norm named {' or '.join(FINAL_NORMS)}"
            f", got {type(model).__name__}"
        )
    return base, found[0]


def _linear_norm(
    norm: nn.Module, d: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "batch d_model"]:
    """The norm without its division: what it does to a direction, weights and centring included."""
    large = d * 1e4  # so that the norm's epsilon does not count
    weight = next(norm.parameters())
    applied = (
        norm(large.to(weight.dtype)).float()
        - norm(torch.zeros_like(large, dtype=weight.dtype)).float()
    )
    return applied * _spread(norm, large)[:, None] / 1e4


def _spread(norm: nn.Module, h: Float[Tensor, "batch d_model"]) -> Float[Tensor, " batch"]:
    """What the norm divides rows by."""
    if isinstance(norm, nn.LayerNorm):
        h = h - h.mean(dim=1, keepdim=True)
    return h.square().mean(dim=1).sqrt()


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
