"""What latents add to a logit straight to the end, past all later blocks.

Vectors of a stream that need no dictionary: control arms for steering.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from activations_cache.hooks import capture, edit
from activations_cache.probe import logits_path, readout, record_of
from monosema.checks import MonosemaError
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

    a_i norm'(d_i) . (U_target - U_against) s, where norm' is the final norm with the scale (and for
    a layer norm the centring) that it has at that token in the model as it is, and s is what the
    model multiplies its head's result by. The metric is the model's own.

    Args:
        model: A causal language model in evaluation mode.
        placed: The dictionary and where it reads and writes; the place must lie on the residual.
        input_ids: One prompt.
        target: Token.
        against: Token whose logit is taken off.

    Raises:
        ValueError: If the model's logits are not its head on the norm of its last stream, times a
            number: where it caps them, say.
    """
    path = logits_path(model)
    if path.cap is not None:
        raise MonosemaError(
            f"logits must be linear in the normed stream for direct_logits, got a soft cap of "
            f"{path.cap:.4g} in {type(model).__name__}; use attribute, which goes through it"
        )
    seen, last = see(model, placed, input_ids, 0), record_of(model).last
    streams: list[Tensor] = []
    with edit(model, {last: lambda stream, _: streams.append(stream) or stream}):
        own = model(input_ids=seen.ids, use_cache=False).logits[0, -1].float()
    final = streams[0][0].float()
    rows = readout(model)
    toward = rows[target] - (0.0 if against is None else rows[against])
    used = directions_of(placed, seen.latents.indices.flatten()).float()
    added = (used @ toward).view(seen.latents.indices.shape)
    if path.norm:
        h = final - final.mean(dim=1, keepdim=True) if path.is_centred else final
        added = added / h.square().mean(dim=1, keepdim=True).sqrt()
    scores = seen.latents.values * seen.size * added
    metric = own[target] - (0.0 if against is None else own[against])
    return Attribution(seen.latents, scores, float(metric))


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
