"""`evaluate`: score a dictionary against a world whose features are known.

Reports of several seeds as plain rows: mean and 95 % interval of the mean over seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy import stats

from activations_cache.checks import MonosemaError, Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.ground_truth.scores import (
    DirectionScores,
    FiringCounts,
    FiringScores,
    Pairs,
    cosines,
    direction_scores,
    matched,
    nearest,
)
from sae.evaluate.ground_truth.world import World, generator_of, rows
from sae.metrics import FVU, Agreement, L0Histogram

ROWS_AT_ONCE = 1024
"""Rows that are encoded together."""


@dataclass(frozen=True, kw_only=True)
class GroundTruthReport:
    """What one dictionary scores in one world, and what chance gives there."""

    seed: int
    """Of the world."""
    n_rows: int
    """Rows that were encoded; training never saw them."""
    n_features: int
    """Features of the world."""
    d_sae: int
    """Latents of the dictionary."""
    directions: DirectionScores
    """Of the decoder."""
    firing: FiringScores
    """Over the pairs of the one-to-one assignment."""
    f1_nearest: float
    """F1 of every latent with its nearest feature: SynthSAEBench's F1."""
    fvu: float
    """Fraction of variance unexplained, centred per dimension."""
    shrinkage: float
    """Mean ||x_hat|| / ||x||: 1 without shrinkage."""
    l0: float
    """Mean number of latents that fire in a row."""
    l0_true: float
    """Mean number of features that fire in a row."""
    dead: float
    """Share of the latents that fired in no row."""
    chance_directions: DirectionScores
    """Of as many random directions."""
    chance_firing: FiringScores
    """Of the same latents, paired with features at random."""


class _Chance(NamedTuple):
    directions: DirectionScores
    pairs: Pairs


@torch.no_grad()
def evaluate(
    dictionary: SparseAutoencoder,
    world: World,
    *,
    progress: Progress = silent,
) -> GroundTruthReport:
    """Score a dictionary on the world that it was trained on.

    A random baseline, such as a dictionary with a frozen decoder, is a dictionary like any other.

    Args:
        dictionary: In the units of the world's rows, and on its device.
        world: Its config names the number of rows.
        progress: Called with the unit "rows".

    Raises:
        ValueError: If the dictionary is not as wide as the rows.
    """
    config, widths = world.config, (dictionary.config.d_in, dictionary.config.width_out)
    if widths != (config.d_model, config.d_model):
        raise MonosemaError(
            f"dictionary must have d_in = d_out = d_model={config.d_model}, got {widths}"
        )
    cosine = cosines(world.directions, dictionary.W_dec)
    pairs = matched(cosine)
    chance = _chance(world, dictionary.config.d_sae, pairs)
    sums = _TruthSums(pairs, nearest(cosine), chance.pairs)
    for first in range(0, config.n_rows, ROWS_AT_ONCE):
        end = min(first + ROWS_AT_ONCE, config.n_rows)
        sums.update(dictionary, world, first, end)
        progress(end, config.n_rows, "rows")
    return GroundTruthReport(
        seed=world.seed,
        n_rows=config.n_rows,
        n_features=world.n_features,
        d_sae=dictionary.config.d_sae,
        directions=direction_scores(cosine, pairs),
        firing=sums.matched.compute(),
        f1_nearest=sums.nearest.compute().f1,
        fvu=sums.fvu.compute(),
        shrinkage=sums.agreement.norm_ratio,
        l0=sums.l0.mean,
        l0_true=sums.l0_true.mean,
        dead=float((sums.nearest.latent == 0).double().mean()),
        chance_directions=chance.directions,
        chance_firing=sums.chance.compute(),
    )


def _chance(world: World, d_sae: int, pairs: Pairs) -> _Chance:
    """Scores of random directions, and the pairs with their latents shuffled."""
    generator = generator_of(world.seed, "chance", d_sae)
    drawn = torch.randn(d_sae, world.config.d_model, generator=generator)
    cosine = cosines(world.directions, drawn.to(world.directions))
    order = torch.randperm(len(pairs.latents), generator=generator)
    shuffled = pairs._replace(latents=pairs.latents[order.to(pairs.latents.device)])
    return _Chance(direction_scores(cosine, matched(cosine)), shuffled)


class _TruthSums:
    """The streaming figures of an evaluation."""

    def __init__(self, pairs: Pairs, of_nearest: Pairs, at_random: Pairs) -> None:
        self.matched, self.chance = FiringCounts(pairs), FiringCounts(at_random)
        self.nearest = FiringCounts(of_nearest)
        self.fvu, self.agreement, self.l0, self.l0_true = (
            FVU(),
            Agreement(),
            L0Histogram(),
            L0Histogram(),
        )

    def update(self, dictionary: SparseAutoencoder, world: World, first: int, end: int) -> None:
        """Add rows first..end - 1 of the scoring stream."""
        x, acts = rows(world, first, end, split="score")
        fires = dictionary.encode_dense(x) > 0
        x_hat = dictionary(x)
        self.fvu.update(x, x_hat)
        self.agreement.update(x, x_hat)
        self.l0.update(fires.float())
        self.l0_true.update(acts)
        for counts in (self.matched, self.nearest, self.chance):
            counts.update(fires, acts > 0)


COLUMNS: dict[str, Callable[[GroundTruthReport], float]] = {
    "MCC": lambda report: report.directions.mcc,
    "MMCS": lambda report: report.directions.mmcs,
    "recovered": lambda report: report.directions.recovered,
    "unique": lambda report: report.directions.uniqueness,
    "F1": lambda report: report.firing.f1,
    "F1 nearest": lambda report: report.f1_nearest,
    "FVU": lambda report: report.fvu,
    "shrinkage": lambda report: report.shrinkage,
    "L0": lambda report: report.l0,
    "dead": lambda report: report.dead,
}
"""The figures of a row."""

CHANCE: dict[str, Callable[[GroundTruthReport], float]] = {
    "MCC": lambda report: report.chance_directions.mcc,
    "MMCS": lambda report: report.chance_directions.mmcs,
    "recovered": lambda report: report.chance_directions.recovered,
    "unique": lambda report: report.chance_directions.uniqueness,
    "F1": lambda report: report.chance_firing.f1,
}
"""The figures of the row of chance floors."""


def table_rows(reports: Mapping[str, Sequence[GroundTruthReport]]) -> list[tuple[str, ...]]:
    """A head, a row per dictionary, and below each the chance floor of its scores.

    Args:
        reports: By the dictionary's name, one report per seed; each report has its own world, so
            the interval holds the noise of training and of the world.
    """
    lines: list[tuple[str, ...]] = [("dictionary", "seeds", *COLUMNS)]
    for name, of_one in reports.items():
        n = str(len(of_one))
        lines.append((name, n, *_cells(of_one, COLUMNS)))
        lines.append((f"{name}, chance", n, *_cells(of_one, CHANCE)))
    return lines


def table_text(lines: Sequence[Sequence[str]]) -> str:
    """The rows as text in columns of one width each."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; nan for one value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    t = float(stats.t.ppf(0.975, n - 1))
    return mean, t * spread / math.sqrt(n)


def figure(values: Sequence[float]) -> str:
    """A cell: the mean, with its interval where there are several values."""
    mean, half = interval(values)
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ±{half:.3f}"


def _cells(
    reports: Sequence[GroundTruthReport],
    figures: Mapping[str, Callable[[GroundTruthReport], float]],
) -> list[str]:
    values = {name: [read(report) for report in reports] for name, read in figures.items()}
    return [figure(values[name]) if name in values else "" for name in COLUMNS]
