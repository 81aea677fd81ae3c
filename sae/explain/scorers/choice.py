"""The scorers that need nothing but a judge, by their names."""

from collections.abc import Sequence

from sae.explain.config import ScorerName
from sae.explain.scorers.detection import Detection, Fuzzing
from sae.explain.scorers.intruder import Intruder
from sae.explain.scorers.rubric import Rubric
from sae.explain.scorers.score import Scorer
from sae.explain.scorers.simulation import Simulation

_SCORERS: dict[str, Scorer] = {
    scorer.name: scorer for scorer in (Detection(), Fuzzing(), Simulation(), Rubric(), Intruder())
}


def scorers_of(names: Sequence[ScorerName]) -> tuple[Scorer, ...]:
    """In the order of the names."""
    return tuple([_SCORERS[name] for name in names])
