"""Integrated gradients of latents: gradients averaged along a path to the stream as it is.

And a prompt's metric as a module whose input is its latents, for captum and what else takes one.

Where the path begins decides what it says (Sundararajan et al. 2017, arXiv 1703.01365; Sturmfels et
al. 2020): a latent gets what it adds beyond what it has there. So several baselines stand side by
side, and how far they agree.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from scipy import stats
from torch import Tensor, nn

from activations_cache.checks import MonosemaError
from sae.autoencoder import SparseAutoencoder
from sae.steer.attribution import (
    Attribution,
    Metric,
    PromptRows,
    copies,
    gradient_at,
    metric_at,
    see,
)
from sae.steer.edits import directions_of

Baseline = Literal["off", "zero", "mean", "sampled"]
"""Latents off, biases and error as they are; a stream of zeros; the mean of other rows; such rows
drawn at random, over which the result is averaged (expected gradients). From zeros the gradient of
a norm has no bound, so the sum misses the difference there: read the gap."""


class PathAttribution(NamedTuple):
    """Integrated gradients, and how far they are from complete."""

    attribution: Attribution
    """Scores along the path, of the latents that fire."""
    total: float
    """Sum over the whole path: of these latents, and beyond "off" of all else that changes on it.
    """
    difference: float
    """The metric of the model as it is less that at the path's start: what the sum should be."""

    @property
    def gap(self) -> float:
        """|total - difference| / |difference|: 0 where the path is followed exactly."""
        return abs(self.total - self.difference) / max(abs(self.difference), 1e-12)


class MetricOfLatents(nn.Module):
    """A metric as a function of the activations of a prompt's latents; biases and error stay.

    captum's methods take it as it is, and zeros are latents that are off:

        f = MetricOfLatents(model, placed, ids, logit_difference(paris, rome))
        scores = captum.attr.IntegratedGradients(f).attribute(f.activations)
        position, latent = f.entries[int(scores.argmax())]
    """

    def __init__(
        self,
        model: nn.Module,
        placed: SparseAutoencoder,
        input_ids: Shaped[Tensor, "example ..."],
        metric: Metric,
        *,
        first_position: int = 1,
    ) -> None:
        """Read the prompt once.

        Args:
            model: A model in evaluation mode.
            placed: The dictionary and where it reads and writes.
            input_ids: One prompt, or the pixels of one image.
            metric: Of the logits.
            first_position: Latents at positions below this one are not among the inputs.
        """
        super().__init__()
        seen = see(model, placed, input_ids, first_position)
        position, place = (seen.latents.values != 0).nonzero(as_tuple=True)
        numbers = seen.latents.indices[position, place]
        self._asked = (model, placed, seen.ids, metric)  # a tuple: their weights are not ours
        self._position, self._n_positions = position, len(seen.x)
        self._added = directions_of(placed, numbers) * seen.size[position]
        self.entries = list(zip(position.tolist(), numbers.tolist(), strict=True))
        """Position and latent of each input."""
        self.activations = seen.latents.values[position, place][None]
        """The inputs as they are, (1, entry); the entries that fire."""

    def forward(self, activations: Float[Tensor, "example entry"]) -> Float[Tensor, " example"]:
        """The metric with these activations in the place of the prompt's own."""
        model, placed, ids, metric = self._asked
        change = (activations - self.activations)[:, :, None] * self._added
        moved = change.new_zeros(len(change), self._n_positions, change.shape[2])
        moved = moved.index_add(1, self._position, change)
        return metric_at(model, placed, copies(ids, len(change)), metric, moved)[0]


class _Start(NamedTuple):
    """Where a path begins, less the stream as it is, and what latents add there."""

    moved: Float[Tensor, "pos d_out"]
    latents: Float[Tensor, " d_sae"] | None
    """Activations, times what their directions are multiplied by; None where all are off."""


def integrated_gradients(  # noqa: PLR0913
    model: nn.Module,
    placed: SparseAutoencoder,
    input_ids: Shaped[Tensor, "example ..."],
    metric: Metric,
    *,
    baseline: Baseline = "off",
    rows: Float[Tensor, "row d_in"] | None = None,
    n_steps: int = 16,
    n_draws: int = 8,
    seed: int = 0,
    first_position: int = 1,
) -> PathAttribution:
    """Gradients averaged while the stream goes from a baseline to what it is.

    With "off" the stream is h - (1 - t) sum_i a_i d_i for t from 0 to 1. The average is taken by
    Gauss-Legendre.

    Args:
        model: A model in evaluation mode.
        placed: The dictionary and where it reads and writes.
        input_ids: One prompt, or the pixels of one image.
        metric: Of the logits.
        baseline: Where the path begins.
        rows: Rows of other texts, for "mean" and "sampled".
        n_steps: Points on the path; all in one forward.
        n_draws: Rows that are drawn for "sampled".
        seed: Decides which.
        first_position: Positions below this one stay as they are.

    Raises:
        ValueError: If rows are missing, or a dictionary that predicts another place than it reads
            has another baseline than "off".
    """
    seen = see(model, placed, input_ids, first_position)
    indices = seen.latents.indices
    directions = directions_of(placed, indices.flatten()).view(*indices.shape, -1)
    contributions = seen.latents.values * seen.size
    starts = [_off(contributions, directions)]
    if baseline != "off":
        starts = _starts(placed, seen, baseline, rows, n_draws, seed)
    scores, totals, ends = torch.zeros_like(contributions), [], []
    for start in starts:
        start.moved[:first_position] = 0
        mean, of_ends = _follow(model, placed, seen, metric, start.moved, n_steps)
        along = torch.einsum("pkd,pd->pk", directions, mean.to(directions))
        change = contributions - (0.0 if start.latents is None else start.latents[indices])
        change[:first_position] = 0
        scores += change * along / len(starts)
        totals.append(float(-(start.moved * mean.to(start.moved)).sum()))
        ends.append(of_ends)
    as_it_is, at_start = torch.stack(ends).mean(dim=0).tolist()
    attribution = Attribution(seen.latents, scores, as_it_is)
    return PathAttribution(attribution, sum(totals) / len(totals), as_it_is - at_start)


def _follow(
    model: nn.Module,
    placed: SparseAutoencoder,
    seen: PromptRows,
    metric: Metric,
    moved: Float[Tensor, "pos d_out"],
    n_steps: int,
) -> tuple[Float[Tensor, "pos d_out"], Float[Tensor, " 2"]]:
    """The mean gradient on the way back from a move, and the metric without and with it."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(n_steps))
    back = (1 - (nodes + 1) / 2).to(moved)[:, None, None] * moved
    gradient, _ = gradient_at(model, placed, copies(seen.ids, n_steps), metric, back)
    mean = ((weights / 2).to(gradient)[:, None, None] * gradient).sum(dim=0)
    both = torch.stack([torch.zeros_like(moved), moved])
    with torch.no_grad():
        ends, _ = metric_at(model, placed, copies(seen.ids, 2), metric, both)
    return mean, ends


def _off(contributions: Float[Tensor, "pos k"], directions: Float[Tensor, "pos k d_out"]) -> _Start:
    return _Start(-(contributions[:, :, None] * directions).sum(dim=1), None)


@torch.no_grad()
def _starts(
    placed: SparseAutoencoder,
    seen: PromptRows,
    baseline: Baseline,
    rows: Float[Tensor, "row d_in"] | None,
    n_draws: int,
    seed: int,
) -> list[_Start]:
    """Starts that are streams of their own."""
    if placed.hook_point != placed.config.hook_point_out:
        raise MonosemaError(
            f"baseline must be 'off' for a dictionary that predicts another place than it reads, "
            f"got {baseline!r}"
        )
    x = seen.x.float()
    if baseline == "zero":
        return [_Start(-x, None)]
    if rows is None or len(rows) == 0:
        raise MonosemaError(f"rows must be given for the baseline {baseline!r}, got none")
    rows = rows.to(x)
    added = placed.encode_dense(rows) * placed.output_norm(rows).size
    if baseline == "mean":
        return [_Start(rows.mean(dim=0) - x, added.mean(dim=0))]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(rows), (n_draws,), generator=generator).tolist()
    return [_Start(rows[i] - x, added[i]) for i in drawn]


def agreements(paths: Mapping[str, PathAttribution]) -> dict[str, float]:
    """Rank correlation of each baseline's scores with those of the first, over latents that fire.

    nan where fewer than three fire or a side is constant.
    """
    first = next(iter(paths.values())).attribution
    fires = first.latents.values != 0
    sides: Sequence[tuple[str, Tensor]] = [
        (name, path.attribution.scores[fires].cpu()) for name, path in paths.items()
    ]
    if int(fires.sum()) < 3:
        return dict.fromkeys(paths, float("nan"))
    return {name: float(np.asarray(stats.spearmanr(sides[0][1], side))[0]) for name, side in sides}
