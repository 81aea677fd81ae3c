"""Which latents a prediction depends on: by gradient, by ablation, and directly.

attr_i = a_i (d_i . grad_x m) is the linear estimate of what ablating latent i at a position takes
from a metric m of the logits (Templeton et al. 2024, "Scaling Monosemanticity", attribution). The
direct part is what a latent adds to a logit straight to the end, past all later blocks. Vectors of
a stream that need no dictionary are here too: they are control arms for steering.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.hooks import capture, edit
from activations_cache.probe import logits_path, readout, record_of
from sae.autoencoder import Latents, SparseAutoencoder
from sae.steer.edits import directions_of

Metric = Callable[[Float[Tensor, "example pos vocab"]], Float[Tensor, " example"]]
"""From logits to one number per example."""


def logit_difference(target: int, against: int | None = None) -> Metric:
    """The logit of one token at the last position, less that of another."""

    def metric(logits: Float[Tensor, "example pos vocab"]) -> Float[Tensor, " example"]:
        last = logits[:, -1].to(torch.promote_types(logits.dtype, torch.float32))
        return last[:, target] - (0.0 if against is None else last[:, against])

    return metric


class Attribution(NamedTuple):
    """Scores of the latents that fire, position by position; 0 where a place is padding."""

    latents: Latents
    """Activations and numbers, both (pos, k)."""
    scores: Float[Tensor, "pos k"]
    """What each latent is held to add to the metric at its position."""
    metric: float
    """The metric of the model as it is."""

    def top(self, n: int) -> list[tuple[int, int, float]]:
        """The n entries with the largest scores by size, as (position, latent, score)."""
        order = self.scores.abs().flatten().argsort(descending=True)[:n].tolist()
        width = self.scores.shape[1]
        places = [divmod(i, width) for i in order]
        return [(p, int(self.latents.indices[p, j]), float(self.scores[p, j])) for p, j in places]


class PromptRows(NamedTuple):
    """One prompt at the dictionary's place."""

    ids: Shaped[Tensor, "example ..."]
    x: Float[Tensor, "pos d_in"]
    latents: Latents
    size: Float[Tensor, "pos _"]
    """What an activation's direction is multiplied by, from the norm of the input."""


def attribute(
    model: nn.Module,
    placed: SparseAutoencoder,
    input_ids: Shaped[Tensor, "example ..."],
    metric: Metric,
    *,
    first_position: int = 1,
) -> Attribution:
    """Gradient times activation of every latent at every position, by one backward pass.

    Args:
        model: A model in evaluation mode.
        placed: The dictionary and where it reads and writes.
        input_ids: One prompt; or the pixels of one image, for a model that takes them.
        metric: Of the logits, such as `logit_difference(paris, rome)`.
        first_position: Positions below this one have no scores.
    """
    seen = see(model, placed, input_ids, first_position)
    gradient, value = gradient_at(model, placed, seen.ids, metric, torch.zeros(1))
    return Attribution(seen.latents, _along(placed, seen, gradient[0]), value[0])


@torch.no_grad()
def ablation_effects(
    model: nn.Module,
    placed: SparseAutoencoder,
    input_ids: Shaped[Tensor, "example ..."],
    metric: Metric,
    entries: list[tuple[int, int]],
    *,
    at_once: int = 32,
    progress: Progress | None = None,
) -> Float[Tensor, " k"]:
    """What the metric loses when one latent is ablated at one position, for each such entry.

    Args:
        model: A model in evaluation mode.
        placed: The dictionary and where it reads and writes.
        input_ids: One prompt; or the pixels of one image, for a model that takes them.
        metric: Of the logits.
        entries: (position, latent) each.
        at_once: Ablated prompts in one forward.
        progress: Called after each forward.
    """
    progress, effects = progress or silent, []
    seen = see(model, placed, input_ids, 0)
    base, _ = metric_at(model, placed, seen.ids, metric, torch.zeros(1))
    for start in range(0, len(entries), at_once):
        part = entries[start : start + at_once]
        taken = torch.stack([_contribution(placed, seen, *entry) for entry in part])
        moved = torch.zeros(len(part), *seen.x.shape[:1], taken.shape[1]).to(taken)
        moved[range(len(part)), [position for position, _ in part]] = -taken
        result, _ = metric_at(model, placed, copies(seen.ids, len(part)), metric, moved)
        effects.append(base[0] - result)
        progress(start + len(part), len(entries), "ablations")
    return torch.cat(effects)


class AttributionAgreement(NamedTuple):
    """How well cheap scores tell what ablation does; Templeton et al. have .81 and .12."""

    attribution: float
    """Pearson correlation of gradient times activation with the ablation's effect."""
    activation: float
    """Pearson correlation of the bare activation with it."""
    n: int
    """Entries compared: pairs of position and latent."""


def agreement(
    model: nn.Module,
    placed: SparseAutoencoder,
    input_ids: Shaped[Tensor, "example ..."],
    metric: Metric,
    *,
    n: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> AttributionAgreement:
    """Ablate the latents that fire, or a random n of them, and correlate with the estimates.

    Args:
        model: A model in evaluation mode.
        placed: The dictionary and where it reads and writes.
        input_ids: One prompt; or the pixels of one image, for a model that takes them.
        metric: Of the logits.
        n: Entries at most.
        seed: Decides which, where more fire.
        progress: Called after each forward.
    """
    result = attribute(model, placed, input_ids, metric)
    fires = (result.latents.values != 0).nonzero()
    fires = fires[torch.randperm(len(fires), generator=torch.Generator().manual_seed(seed))[:n]]
    position, place = fires.unbind(dim=1)
    numbers = result.latents.indices[position, place]
    entries = list(zip(position.tolist(), numbers.tolist(), strict=True))
    effects = ablation_effects(model, placed, input_ids, metric, entries, progress=progress)
    scores, values = (t[position, place] for t in (result.scores, result.latents.values))
    return AttributionAgreement(_pearson(scores, effects), _pearson(values, effects), len(entries))


@torch.no_grad()
def see(
    model: nn.Module,
    placed: SparseAutoencoder,
    input_ids: Shaped[Tensor, "example ..."],
    first_position: int,
) -> PromptRows:
    """Read a prompt at the dictionary's place.

    Raises:
        ValueError: If there is not one prompt.
    """
    if len(input_ids) != 1:
        raise MonosemaError(f"input_ids must be one prompt, got {len(input_ids)}")
    ids = input_ids.to(next(model.parameters()).device)
    with capture(model, [placed.hook_point]) as run:
        x = run(ids)[placed.hook_point][0]
    latents = placed.encode(x)
    values = latents.values.clone()
    values[:first_position] = 0
    size = placed.output_norm(x).size
    whole = torch.as_tensor(size).to(values).expand(len(x), 1)
    return PromptRows(ids, x, Latents(values, latents.indices), whole)


def _along(
    placed: SparseAutoencoder, seen: PromptRows, gradient: Float[Tensor, "pos d_out"]
) -> Float[Tensor, "pos k"]:
    """a_i (d_i . gradient) for each latent that fires."""
    indices, values = seen.latents.indices, seen.latents.values
    directions = directions_of(placed, indices.flatten()).view(*indices.shape, -1)
    return values * seen.size * torch.einsum("pkd,pd->pk", directions, gradient.to(directions))


def _contribution(
    placed: SparseAutoencoder, seen: PromptRows, position: int, latent: int
) -> Float[Tensor, " d_out"]:
    at = seen.latents.indices[position] == latent
    f = (seen.latents.values[position] * at).sum()
    return f * placed.direction(latent) * seen.size[position]


def metric_at(
    model: nn.Module,
    placed: SparseAutoencoder,
    ids: Shaped[Tensor, "example ..."],
    metric: Metric,
    moved: Float[Tensor, "*example"],
) -> tuple[Float[Tensor, " example"], Tensor]:
    """The metric of each example with its stream moved, and that stream as a leaf of the graph."""
    leaves: list[Tensor] = []

    def move(stream: Tensor, _: Tensor) -> Tensor:
        wide = stream.detach().to(torch.promote_types(stream.dtype, torch.float32))
        leaf = (wide + moved.view(-1, *moved.shape[1:]).to(wide)).requires_grad_()
        leaves.append(leaf)
        return leaf

    with edit(model, {placed.config.hook_point_out: move}):
        of_text = {"input_ids": ids, "use_cache": False}
        logits = (model(**of_text) if ids.dim() == 2 else model(ids)).logits
    return metric(logits), leaves[0]


def copies(ids: Shaped[Tensor, "1 ..."], n: int) -> Shaped[Tensor, "n ..."]:
    """One prompt, or one image, n times."""
    return ids.expand(n, *[-1] * (ids.dim() - 1))


def gradient_at(
    model: nn.Module,
    placed: SparseAutoencoder,
    ids: Shaped[Tensor, "example ..."],
    metric: Metric,
    moved: Float[Tensor, "*example"],
) -> tuple[Float[Tensor, "example pos d_out"], list[float]]:
    """The metric's gradient at the dictionary's output, and the metric of each example."""
    with torch.enable_grad():
        result, leaf = metric_at(model, placed, ids, metric, moved)
        (gradient,) = torch.autograd.grad(result.sum(), leaf)
    return gradient, result.detach().tolist()


def _pearson(a: Float[Tensor, " k"], b: Float[Tensor, " k"]) -> float:
    pair = torch.stack([a.double(), b.double().to(a.device)])
    return float(torch.corrcoef(pair)[0, 1]) if len(a) > 1 else float("nan")


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
        placed: The dictionary and where it reads and writes; the place must lie on the stream.
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
        logits = model(input_ids=seen.ids, use_cache=False).logits[0, -1].float()
    final = streams[0][0].float()
    rows = readout(model)
    toward = rows[target] - (0.0 if against is None else rows[against])
    used = directions_of(placed, seen.latents.indices.flatten()).float()
    added = (used @ toward).view(seen.latents.indices.shape)
    if path.norm:
        h = final - final.mean(dim=1, keepdim=True) if path.is_centred else final
        added = added / h.square().mean(dim=1, keepdim=True).sqrt()
    scores = seen.latents.values * seen.size * added
    metric = logits[target] - (0.0 if against is None else logits[against])
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
    result = torch.randn(like.shape, generator=generator).to(like)
    return result / result.norm() * like.norm()
