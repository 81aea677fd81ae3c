"""Labels of neighbours for latents that fire too seldom to have one of their own; marked."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sae.explain.explainers import Explanation


def borrow(
    dec_rows: Float[Tensor, "d_sae d_out"],
    labels: Mapping[int, Explanation],
    latents: list[int],
    least: float = 0.5,
) -> dict[int, Explanation]:
    """The label of the labelled latent with the closest direction, if it is close enough.

    Args:
        dec_rows: Directions.
        labels: Labels that were made.
        latents: Who needs one.
        least: Smallest cosine.

    Returns:
        A label for those that have a neighbour; each says whose it is, and the text says so too.
    """
    if not labels or not latents:
        return {}
    directions = torch.nn.functional.normalize(dec_rows, dim=1)
    known = torch.tensor(sorted(labels))
    cosines, best = (directions[latents] @ directions[known].T).max(dim=1)
    found = {}
    for latent, cosine, place in zip(latents, cosines.tolist(), best.tolist(), strict=True):
        other = int(known[place])
        if cosine >= least and other != latent:
            text = f"like latent {other} (cosine {cosine:.2f}): {labels[other].text}"
            found[latent] = Explanation(latent, text, "borrowed/1", borrowed_from=other)
    return found
