"""A dictionary's labels in a few figures, failures first."""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sae.explain.held_out import N_STEPS, HeldOut
from sae.explain.scores import FLOOR, Mean, Scores, bootstrap_mean
from sae.statistics import wilson

LEVEL = 0.01
"""Where a label beats its permutation null; 1 % of labels that say nothing do."""


@dataclass(frozen=True)
class Summary:
    """The dictionary's labels in a few figures; nan where there is nothing to average."""

    n_insufficient: int
    """Live latents that fire too seldom to be scored; counted, never dropped."""
    n_dead: int
    """Latents that never fire in the two splits."""
    n_scored: int
    """Live latents whose label was scored."""
    n_latents: int
    """All latents."""
    beats_null: Mean
    """Share of the live latents whose held-out AUC beats its permutation null at 1 %; Wilson's
    interval. Latents without a score count as not beating it."""
    beats_null_strong: Mean
    """The same for the AUC of the strongest tenth of the firings."""
    auc: Mean
    """Mean AUC over the scored latents; its interval is a bootstrap over latents."""
    auc_strong: Mean
    """Mean AUC of the strongest tenth of the firings, over the latents that have one."""
    n_strong: int
    """Latents that have one."""
    auc_median: float
    """Median AUC over the scored latents."""
    auc_all_live: float
    """Mean AUC over all live latents, the insufficient ones counted at the floor."""
    auc_wide: Mean
    """Mean AUC of the larger rules, which are not what the labels say."""
    control_auc: Mean
    """Mean AUC when every latent is scored with another latent's label."""
    share_above_chance: float
    """Share of the scored latents whose interval lies above the floor."""
    curve: tuple[float, ...]
    """Share of a latent's firings that its words explain, by fifths of its largest activation;
    means over the latents that fire there."""
    curve_n: tuple[int, ...]
    """Firings in each fifth, of all scored latents together."""
    base: float
    """What the curve is for words that say nothing: the mean share of rows with them."""
    floor: float
    """The AUC of knowing nothing."""
    n_rows_explain: int
    """Rows from which the labels were made."""
    n_rows_score: int
    """Rows on which they were scored."""


class Found(NamedTuple):
    """What a summary is made of."""

    scores: Scores
    wide: Scores
    control: Scores
    held_out: HeldOut


def summary_of(
    found: Found,
    wanted: np.ndarray,
    live: np.ndarray,
    n_rows: tuple[int, int],
    generator: np.random.Generator,
) -> Summary:
    """Average over latents.

    Args:
        found: Scores of all latents.
        wanted: Which were scored.
        live: Which fire at all.
        n_rows: Of the explain and of the score split.
        generator: Of the bootstrap.
    """
    scores, wide, control, unseen = found
    auc = scores.auc[wanted]
    n_scored, n_live = int(wanted.sum()), int(live.sum())
    at_floor = FLOOR * (n_live - n_scored)
    strong = unseen.auc_strong[np.isfinite(unseen.auc_strong)]
    return Summary(
        n_insufficient=n_live - n_scored,
        n_dead=len(wanted) - n_live,
        n_scored=n_scored,
        n_latents=len(wanted),
        beats_null=_share(unseen.beats(LEVEL), live),
        beats_null_strong=_share(unseen.beats(LEVEL, strong=True), live),
        auc=bootstrap_mean(auc, generator),
        auc_strong=bootstrap_mean(strong, generator),
        n_strong=len(strong),
        auc_median=float(np.median(auc)) if n_scored else math.nan,
        auc_all_live=float(auc.sum() + at_floor) / n_live if n_live else math.nan,
        auc_wide=bootstrap_mean(wide.auc[wanted], generator),
        control_auc=bootstrap_mean(control.auc[np.isfinite(control.auc)], generator),
        share_above_chance=float((scores.low[wanted] > FLOOR).mean()) if n_scored else math.nan,
        curve=_curve(unseen, wanted),
        curve_n=tuple(unseen.curve_n[wanted].sum(axis=0).tolist()),
        base=float(unseen.base[wanted].mean()) if n_scored else math.nan,
        floor=FLOOR,
        n_rows_explain=n_rows[0],
        n_rows_score=n_rows[1],
    )


def _share(holds: np.ndarray, among: np.ndarray) -> Mean:
    if not among.any():
        return Mean(math.nan, math.nan, math.nan)
    return Mean(*wilson(int(holds[among].sum()), int(among.sum())))


def _curve(unseen: HeldOut, wanted: np.ndarray) -> tuple[float, ...]:
    steps = [unseen.curve[wanted, step] for step in range(N_STEPS)]
    known = [step[np.isfinite(step)] for step in steps]
    return tuple(float(step.mean()) if len(step) else math.nan for step in known)


def flat(summary: Summary) -> dict[str, object]:
    """The summary as JSON takes it: means as objects, nan, which JSON does not know, as null."""
    found: dict[str, object] = {}
    for field in dataclasses.fields(summary):
        value = getattr(summary, field.name)
        if isinstance(value, Mean):
            found[field.name] = {end: known_or_none(n) for end, n in value._asdict().items()}
        elif isinstance(value, tuple):
            found[field.name] = [known_or_none(float(number)) for number in value]
        else:
            found[field.name] = known_or_none(value) if isinstance(value, float) else value
    return found


def known_or_none(value: float) -> float | None:
    """The value; None in the place of nan."""
    return None if math.isnan(value) else value
