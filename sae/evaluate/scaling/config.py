"""What a scaling study may cost and what it varies, as a frozen config; no torch here."""

from dataclasses import dataclass
from typing import Literal

from activations_cache.checks import at_least, positive, require


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
        for name in ("d_in", "batch"):
            at_least(name, getattr(self, name), 1)
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
