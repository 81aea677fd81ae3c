"""`plan`: the runs of a scaling study, with what each costs."""

from dataclasses import dataclass
from typing import Literal

from sae.evaluate.scaling.config import ScalingConfig


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One dictionary that is to be trained."""

    d_sae: int
    """Number of latents."""
    k: int
    """Latents that fire in a row."""
    rows: int
    """Rows to train on, once each; runs of as many rows share a pass."""
    steps: int
    """rows / batch."""
    flops: float
    """What it costs."""


def flops_per_row(d_in: int, d_sae: int, k: int, step: Literal["sparse", "dense"]) -> float:
    """Operations of a training step for one row.

    The products alone: a sparse step has the encoder's (2 d F) and four of k rows (decoding, and
    the gradients of activations, decoder and encoder: 8 k d); a dense step has five of 2 d F.
    AuxK, Adam and the selection are not counted.
    """
    return 2.0 * d_in * d_sae + 8.0 * k * d_in if step == "sparse" else 10.0 * d_in * d_sae


def plan(config: ScalingConfig) -> list[PlannedRun]:
    """The grid whose longest pass is as long as the budget and the rows allow, cheapest first.

    Raises:
        ValueError: If the shortest pass would be shorter than one step.
    """
    sizes = [(width, k) for width in config.widths for k in config.ks]
    costs = {size: flops_per_row(config.d_in, *size, config.step) for size in sizes}
    shares = [config.spacing**-i for i in range(config.passes)]
    longest = config.budget_flops / (sum(shares) * sum(costs.values()))
    longest = min(longest, config.max_rows or longest)
    steps = [int(longest * share / config.batch) for share in reversed(shares)]
    if steps[0] < 1:
        least = config.batch * config.spacing ** (config.passes - 1)
        raise ValueError(
            f"the longest pass must have at least {least:.3g} rows, so that the shortest has one "
            f"step, got {longest:.3g}; raise budget_flops or lower widths, passes or batch"
        )
    runs = [
        PlannedRun(
            d_sae=width,
            k=k,
            rows=n * config.batch,
            steps=n,
            flops=n * config.batch * costs[width, k],
        )
        for n in steps
        for width, k in sizes
    ]
    return sorted(runs, key=lambda run: run.flops)
