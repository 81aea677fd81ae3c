"""BatchTopK's threshold, which follows what the batches say of it."""

import torch
from jaxtyping import Float
from torch import Tensor

THRESHOLD_BATCHES = 100
"""BatchTopK's threshold is a mean over about so many batches, or the last 20th of a short run."""


def threshold_rate(total_steps: int) -> float:
    """By how much BatchTopK's threshold follows what a batch says of it."""
    return 1 / min(max(total_steps / 20, 1), THRESHOLD_BATCHES)


@torch.no_grad()
def follow_(threshold: Float[Tensor, ""], seen: Float[Tensor, ""], rate: float) -> None:
    """Move a running threshold towards the one of a batch, in place; the first is taken as it is.

    A batch in which nothing fires says nothing.
    """
    start = torch.where(threshold.isnan(), seen, threshold)
    moved = start + rate * (seen - start)
    threshold.copy_(torch.where(seen.isfinite(), moved, threshold))
