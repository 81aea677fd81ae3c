"""What evaluations and scaling studies read and vary, as frozen configs; no torch here.

`plan` lists the runs of a scaling study, with what each costs.
"""

from dataclasses import dataclass
from typing import Literal

from monosema.checks import MonosemaError, all_at_least, at_least, positive, require


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """A grid of widths, k and numbers of rows whose runs together cost a given compute.

    Runs of as many rows are one pass: their dictionaries train side by side on the same rows.
    """

    output: str
    """Directory of the plan."""
    d_in: int
    """Width of the rows."""
    budget_flops: float
    """Floating-point operations of all runs together."""
    widths: tuple[int, ...]
    """Numbers of latents, rising."""
    ks: tuple[int, ...] = (32,)
    """Latents that fire in a row, rising; a dense step's cost does not depend on it."""
    passes: int = 4
    """Numbers of rows that are tried."""
    spacing: float = 2.0
    """Each pass has so many times the rows of the one before."""
    batch: int = 4096
    """Rows of a step."""
    max_rows: int | None = None
    """Rows that there are; no limit when absent."""
    step: Literal["sparse", "dense"] = "sparse"
    """sparse: 2 d F + 8 k d operations a row (TopK family); dense: 10 d F (ReLU family)."""
    flops_per_second: float | None = None
    """What the device does, for the plan's hours; from a measured row, not from a data sheet."""

    def __post_init__(self) -> None:
        """Check ranges, and the fields against each other."""
        require(len(self.output) > 0, "output", "name a directory", self.output)
        all_at_least(self, d_in=1, batch=1)
        at_least("passes", self.passes, 2)
        positive("budget_flops", self.budget_flops)
        require(self.spacing > 1, "spacing", "be above 1", self.spacing)
        for name in ("widths", "ks"):
            sizes = getattr(self, name)
            rises = all(low < high for low, high in zip((0, *sizes), sizes, strict=False))
            require(len(sizes) > 0 and rises, name, "rise from at least 1", sizes)
        require(len(self.widths) > 1, "widths", "be at least 2", self.widths)
        rule = f"be at most the smallest of widths, {self.widths[0]}"
        require(self.ks[-1] <= self.widths[0], "ks", rule, self.ks[-1])
        for name in ("max_rows", "flops_per_second"):
            if (value := getattr(self, name)) is not None:
                positive(name, value)


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
        raise MonosemaError(
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


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Sizes of an evaluation."""

    n_contexts: int = 24
    """Held-out contexts through which the model runs with each dictionary spliced in."""
    n_contexts_special: int = 8
    """Those among them that are run again with the special positions spliced too; 0 for none."""
    contexts_per_forward: int = 8
    """Contexts that the model reads at once; their logits are held twice."""
    rows_per_chunk: int = 4096
    """Rows that are encoded at once."""
    n_rows_firing: int = 50_000
    """Training rows in which firing is counted, beside all held-out rows; 0 for none."""
    n_images: int = 2000
    """Training images, and as many held out, whose classes are told with each dictionary spliced
    in; 0 for none."""
    n_neighbours: int = 5
    """Nearest training images that tell a class."""
    n_resamples: int = 2000
    """Bootstrap resamples of the contexts or images, for the intervals."""
    seed: int = 0
    """Decides which contexts and rows are taken, and the resamples."""

    def __post_init__(self) -> None:
        """Check ranges, and the fields against each other."""
        all_at_least(
            self, n_contexts=1, contexts_per_forward=1, rows_per_chunk=1, n_neighbours=1,
            n_resamples=1, n_contexts_special=0, n_rows_firing=0, n_images=0, seed=0,
        )  # fmt: skip
        fewer = self.n_contexts_special <= self.n_contexts
        rule = f"be at most n_contexts={self.n_contexts}"
        require(fewer, "n_contexts_special", rule, self.n_contexts_special)
