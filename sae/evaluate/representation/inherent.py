"""IIS: how much of a representation's accuracy survives when only a few concepts may be used."""

import itertools
from collections.abc import Sequence


def inherent_interpretability(
    sparsity: Sequence[float], accuracy: Sequence[float], reference: float
) -> float:
    """Integral of accuracy(s) / reference over the sparsity s, by trapezoids.

    A constant ratio r over [a, b] gives r (b - a). Divide by b - a to compare unlike ranges.

    Args:
        sparsity: Shares of concepts that heads may not use, ascending.
        accuracy: Of the head at each sparsity.
        reference: Accuracy of the dense head.

    Raises:
        ValueError: If there are fewer than two points, they do not ascend, or reference is not
            above 0.
    """
    if len(sparsity) != len(accuracy) or len(sparsity) < 2:
        raise ValueError(
            "sparsity and accuracy must have at least two points each, got "
            f"{len(sparsity)} and {len(accuracy)}"
        )
    if any(a >= b for a, b in itertools.pairwise(sparsity)):
        raise ValueError(f"sparsity must ascend, got {list(sparsity)}")
    if reference <= 0:
        raise ValueError(f"reference must be above 0, got {reference}")
    points = list(zip(sparsity, accuracy, strict=True))
    return sum((b - a) * (p + q) / 2 for (a, p), (b, q) in itertools.pairwise(points)) / reference
