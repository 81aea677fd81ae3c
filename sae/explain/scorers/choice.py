"""The scorers by their names, and what those of them need that look into a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from monosema.checks import MonosemaError
from sae.explain.config import ScorerName
from sae.explain.scorers.by_model import (
    Embed,
    Embedding,
    LogLikelihood,
    NextLogProbs,
    OutputSide,
    Sensitivity,
    Surprisal,
)
from sae.explain.scorers.by_questions import Detection, Fuzzing, Intruder, Rubric, Simulation
from sae.explain.scorers.score import Scorer

_SCORERS: dict[str, Scorer] = {
    scorer.name: scorer for scorer in (Detection(), Fuzzing(), Simulation(), Rubric(), Intruder())
}

WITH_TOOLS: tuple[ScorerName, ...] = ("embedding", "surprisal", "output side", "sensitivity")
"""Those that need a model."""


@dataclass(frozen=True)
class Tools:
    """What a model gives to scorers."""

    embed: Embed
    """Texts to vectors."""
    log_likelihood: LogLikelihood
    """How probable a text is after a prefix."""
    next_log_probs: NextLogProbs
    """What amplifying a latent does to the next token."""
    promoted: Int[Tensor, "d_sae k"]
    """Token ids by the logit lens."""
    peaks_on: Callable[[int, Sequence[str]], list[float]]
    """A latent's largest activation on texts."""


def scorers_of(names: Sequence[ScorerName], tools: Tools | None = None) -> tuple[Scorer, ...]:
    """In the order of the names.

    Raises:
        ValueError: If one needs a model and there is none.
    """
    known = dict(_SCORERS)
    if tools is not None:
        more: tuple[Scorer, ...] = (
            Embedding(tools.embed),
            Surprisal(tools.log_likelihood),
            OutputSide(tools.next_log_probs, tools.promoted),
            Sensitivity(None, tools.peaks_on),
        )
        known |= {scorer.name: scorer for scorer in more}
    missing = [name for name in names if name not in known]
    if missing:
        raise MonosemaError(
            f"scorers must be {', '.join(known)} without a model, got {missing[0]!r}; "
            "use `sae explain`, which has one"
        )
    return tuple([known[name] for name in names])
