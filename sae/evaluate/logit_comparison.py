"""Compares the logits of two runs of a model over the same tokens, context by context."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

LOGITS_AT_ONCE = 1 << 20
"""float32 log-probabilities made at once: larger blocks fall out of a CPU's cache."""


class Tally(NamedTuple):
    """Sums over the scored tokens of each context."""

    n_tokens: Float64[Tensor, " example"]
    ce_base: Float64[Tensor, " example"]
    ce: Float64[Tensor, " example"]
    kl: Float64[Tensor, " example"]
    same: Float64[Tensor, " example"]

    @classmethod
    def joined(cls, parts: list["Tally"]) -> "Tally":
        """One tally of the contexts of several."""
        return cls(*(torch.cat(values) for values in zip(*parts, strict=True)))


def compare(
    base: Float[Tensor, "example pos vocab"],
    logits: Float[Tensor, "example pos vocab"],
    tokens: Int[Tensor, "example pos"],
    skip_positions: int,
    ahead: int = 1,
) -> Tally:
    """Sums over the predictions of each context that are made after the special positions.

    Args:
        base: Logits of the model as it is.
        logits: Logits with another stream.
        tokens: What is predicted; -1 is not scored.
        skip_positions: Predictions at this many first places are left out.
        ahead: How far behind its prediction a token stands; 0 for masked ones.
    """
    targets = tokens[:, skip_positions + ahead :]
    scored = targets >= 0
    example, place = scored.nonzero(as_tuple=True)
    figures = torch.zeros(len(example), 4, dtype=torch.float64, device=base.device)
    step = max(1, LOGITS_AT_ONCE // base.shape[-1])
    for start in range(0, len(example), step):
        part = slice(start, start + step)
        at = example[part], place[part] + skip_positions
        figures[part] = _figures(base[at], logits[at], targets[example[part], place[part]])
    n_tokens = scored.sum(dim=1).double()
    sums = torch.zeros(len(tokens), 4, dtype=torch.float64, device=base.device)
    sums.index_add_(0, example, figures)
    return Tally(n_tokens.cpu(), *sums.cpu().unbind(dim=1))


def _figures(
    base: Float[Tensor, "row vocab"],
    logits: Float[Tensor, "row vocab"],
    targets: Int[Tensor, " row"],
) -> Float64[Tensor, "row 4"]:
    """Cross-entropy of both, KL and agreement at each of some places."""
    log_p = torch.log_softmax(base.float(), dim=1)
    log_q = torch.log_softmax(logits.float(), dim=1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    same = log_p.argmax(dim=1) == log_q.argmax(dim=1)
    ce_base, ce = (-log.gather(1, targets[:, None])[:, 0] for log in (log_p, log_q))
    return torch.stack([ce_base.double(), ce.double(), kl.double(), same.double()], dim=1)
