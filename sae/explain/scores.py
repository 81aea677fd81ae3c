"""How well a label's rule tells firing rows from silent ones, on documents it was not made from.

The score is the area under the ROC curve: the probability that a firing row has a higher score than
a silent one, ties counting half. Chance is 0.5. Rows of one example are not independent, so the
variance is that of sums over examples (Obuchowski 1997, Biometrics 53:567).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy import stats

from monosema.checks import MonosemaError
from sae.explain.config import Kind
from sae.explain.firings import Codes, FiringEntries, concatenated_ranges
from sae.explain.labels import Rules
from sae.explain.text_at_rows import RowText
from sae.statistics import Interval

FLOOR = 0.5
"""The AUC of any rule that knows nothing."""

_LATENTS_AT_ONCE = 64


@dataclass(frozen=True)
class Scores:
    """AUC of labels with its 95 % interval; nan for latents that were not to be scored."""

    auc: Float64[np.ndarray, " d_sae"]
    """Area under the ROC curve."""
    low: Float64[np.ndarray, " d_sae"]
    """Lower end."""
    high: Float64[np.ndarray, " d_sae"]
    """Upper end."""


@dataclass(frozen=True)
class RuleScores(Scores):
    """The same of rules that say of each row whether the latent fires."""

    error: Float64[np.ndarray, " d_sae"]
    """Standard error, clustered by example; the interval is wider where it cannot be trusted."""


class _Present(NamedTuple):
    """In which examples the values of one kind stand, sorted by value."""

    n_rows: np.ndarray  # of each value
    start: np.ndarray  # of each value's pairs
    n_pairs: np.ndarray  # of each value
    example: np.ndarray  # of each pair
    rows: np.ndarray  # with that value in that example, for each pair


class _Ranks(NamedTuple):
    """Placement values of a chunk of latents by the level of the rule's score."""

    auc: np.ndarray  # (latent)
    firing: np.ndarray  # (latent, level): share of silent rows below, ties half
    silent: np.ndarray  # (latent, level): share of firing rows above, ties half
    lowest: np.ndarray  # (latent): the placement of a firing row without a listed word
    highest: np.ndarray  # (latent)


def score_rules(
    rules: Rules,
    kinds: tuple[Kind, ...],
    codes: Codes,
    text: RowText,
    wanted: Bool[np.ndarray, " d_sae"],
) -> RuleScores:
    """Score rule i on the firings of latent i, for the latents that are wanted.

    Args:
        rules: One rule per latent.
        kinds: What `rules.kind` indexes.
        codes: Firings on the rows of the score split.
        text: The text at these rows.
        wanted: Which latents; each must fire in two examples and be silent somewhere.
    """
    names, example = np.unique(text.example, return_inverse=True)
    example = example.astype(np.int32)
    result = RuleScores(*np.full((4, codes.d_sae), np.nan))
    for index, kind in enumerate(kinds):
        latents = np.flatnonzero(wanted & (rules.kind == index))
        if len(latents) == 0:
            continue
        values = text.values[kind]
        present = _present(values, example, len(names), rules.value)
        for first in range(0, len(latents), _LATENTS_AT_ONCE):
            chunk = latents[first : first + _LATENTS_AT_ONCE]
            scores = _score_chunk(rules.of(chunk), codes.take(chunk), values, example, present)
            for name, part in vars(scores).items():
                getattr(result, name)[chunk] = part
    return result


def _present(
    values: np.ndarray, example: np.ndarray, n_examples: int, listed: np.ndarray
) -> _Present:
    n_values = 1 + max(int(values.max()), int(listed.max()), 0)
    has = values >= 0
    key = values[has] * np.int64(n_examples) + example[has]
    pairs, rows = np.unique(key, return_counts=True)
    value = pairs // n_examples
    n_pairs = np.bincount(value, minlength=n_values)
    n_rows = np.bincount(values[has], minlength=n_values)
    return _Present(n_rows, np.cumsum(n_pairs) - n_pairs, n_pairs, pairs % n_examples, rows)


def _score_chunk(
    rules: Rules, entries: FiringEntries, values: np.ndarray, example: np.ndarray, present: _Present
) -> RuleScores:
    n_latents, n_levels = len(rules.kind), rules.value.shape[1] + 1
    level_of = levels(rules)
    table = np.zeros((n_latents, len(present.n_rows) + 1), np.uint8)  # last column: no value
    np.put_along_axis(table, rules.value.astype(np.int64), level_of, axis=1)
    level = table[entries.group, values[entries.row]]
    firing = np.bincount(entries.group * n_levels + level, minlength=n_latents * n_levels)
    firing = firing.reshape(n_latents, n_levels)
    silent = _rows_by_level(rules, level_of, present, len(values)) - firing
    ranks = _ranks(firing, silent, level_of.max(axis=1))
    placed = _Placed(entries.group, level, example[entries.row])
    variance, n_clusters = _variance(rules, level_of, ranks, placed, present, np.bincount(example))
    return _interval(ranks, variance, n_clusters, firing.sum(axis=1))


def levels(rules: Rules) -> Int64[np.ndarray, "d_sae word"]:
    """Rank of each listed value's score within its rule, equal scores sharing one; 0 where none."""
    order = np.argsort(rules.weight, axis=1, kind="stable")
    ascending = np.take_along_axis(rules.weight, order, axis=1)
    higher = np.diff(ascending, axis=1, prepend=0.0) > 0
    result = np.empty(order.shape, np.int64)
    np.put_along_axis(result, order, np.cumsum(higher, axis=1), axis=1)
    return result


def _rows_by_level(rules: Rules, level: np.ndarray, present: _Present, n_rows: int) -> np.ndarray:
    """How many rows, firing or not, have each level: (latent, level)."""
    count = np.where(rules.value >= 0, present.n_rows[rules.value], 0)
    n_latents, n_words = level.shape
    cell = np.arange(n_latents)[:, None] * (n_words + 1) + level
    by_level = np.bincount(cell.ravel(), count.ravel(), n_latents * (n_words + 1))
    by_level = by_level.reshape(n_latents, n_words + 1).astype(np.int64)
    by_level[:, 0] = n_rows - by_level[:, 1:].sum(axis=1)
    return by_level


def _ranks(firing: np.ndarray, silent: np.ndarray, top_level: np.ndarray) -> _Ranks:
    n_firing, n_silent = firing.sum(axis=1, keepdims=True), silent.sum(axis=1, keepdims=True)
    below = (np.cumsum(silent, axis=1) - silent / 2) / n_silent
    above = 1 - (np.cumsum(firing, axis=1) - firing / 2) / n_firing
    auc = (firing * below).sum(axis=1) / n_firing[:, 0]
    return _Ranks(auc, below, above, below[:, 0], below[np.arange(len(auc)), top_level])


class _Placed(NamedTuple):
    """The firing rows of a chunk."""

    group: np.ndarray
    level: np.ndarray
    example: np.ndarray


def _variance(
    rules: Rules,
    level_of: np.ndarray,
    ranks: _Ranks,
    placed: _Placed,
    present: _Present,
    rows_per_example: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Variance of the AUC, and the number of examples in which the latent fires."""
    shape = (len(rules.kind), len(rows_per_example))
    cell = placed.group * shape[1] + placed.example

    def summed(weights: np.ndarray | None) -> np.ndarray:
        return np.bincount(cell, weights, shape[0] * shape[1]).reshape(shape)

    n_firing = summed(None)
    n_silent = rows_per_example - n_firing
    auc = ranks.auc[:, None]
    firing = summed(ranks.firing[placed.group, placed.level]) - n_firing * auc
    silent = _summed_over_rows(rules, level_of, ranks.silent, present, rows_per_example)
    silent = silent - summed(ranks.silent[placed.group, placed.level]) - n_silent * auc
    m, n = n_firing.sum(axis=1), n_silent.sum(axis=1)
    firing_clusters, silent_clusters = (n_firing > 0).sum(axis=1), (n_silent > 0).sum(axis=1)
    variance = (
        _corrected(firing_clusters) * (firing**2).sum(axis=1) / m**2
        + _corrected(silent_clusters) * (silent**2).sum(axis=1) / n**2
        + shape[1] / (shape[1] - 1) * 2 * (firing * silent).sum(axis=1) / (m * n)
    )
    return np.maximum(variance, 0.0), firing_clusters


def _corrected(n_clusters: np.ndarray) -> np.ndarray:
    return n_clusters / np.maximum(n_clusters - 1, 1)


def _summed_over_rows(
    rules: Rules,
    level_of: np.ndarray,
    by_level: np.ndarray,
    present: _Present,
    rows_per_example: np.ndarray,
) -> np.ndarray:
    """Sum over all rows of each example of by_level[latent, level of the row]."""
    lowest = by_level[:, :1]
    latent, column = np.nonzero(rules.value >= 0)
    value = rules.value[latent, column]
    change = by_level[latent, level_of[latent, column]] - lowest[latent, 0]
    n_pairs = present.n_pairs[value]
    pair = concatenated_ranges(present.start[value], n_pairs)
    cell = np.repeat(latent, n_pairs) * len(rows_per_example) + present.example[pair]
    weights = np.repeat(change, n_pairs) * present.rows[pair]
    shape = (len(rules.kind), len(rows_per_example))
    return rows_per_example * lowest + np.bincount(cell, weights, shape[0] * shape[1]).reshape(
        shape
    )


def _interval(
    ranks: _Ranks, variance: np.ndarray, n_clusters: np.ndarray, n_firing: np.ndarray
) -> RuleScores:
    """Wilson's interval, for a mean of placements that lie between the lowest and the highest.

    The variance says how many independent firing rows the figure is worth: at most as many as there
    are; as many as there are examples where all are placed alike, and the variance is 0. A Wald
    interval would have no width there, and a label whose rare words have not come up would look
    known to be useless.
    """
    span = ranks.highest - ranks.lowest
    safe = np.maximum(span, 1e-12)
    share = np.clip((ranks.auc - ranks.lowest) / safe, 0.0, 1.0)
    spread = share * (1 - share)
    alike = (variance <= 1e-18) | (spread <= 1e-12)
    worth = np.where(alike, n_clusters, spread * safe**2 / np.where(alike, 1.0, variance))
    worth = np.minimum(worth, n_firing)
    z2 = stats.t.ppf(0.975, np.maximum(n_clusters - 1, 1)) ** 2
    middle = (share + z2 / (2 * worth)) / (1 + z2 / worth)
    half = np.sqrt(z2 * (spread / worth + z2 / (4 * worth**2))) / (1 + z2 / worth)
    low, high = (ranks.lowest + np.clip(end, 0, 1) * span for end in (middle - half, middle + half))
    low, high = np.minimum(low, ranks.auc), np.maximum(high, ranks.auc)
    return RuleScores(ranks.auc, low, high, np.sqrt(variance))


def exchanged_labels(
    wanted: Bool[np.ndarray, " d_sae"], generator: np.random.Generator
) -> tuple[Int64[np.ndarray, " d_sae"], Bool[np.ndarray, " d_sae"]]:
    """Whose label each latent is scored with as a control, and which latents have another's."""
    scored, partner = np.flatnonzero(wanted), np.arange(len(wanted))
    if len(scored) > 1:
        partner[scored] = derangement(scored, generator)
    return partner, partner != np.arange(len(wanted))


def derangement(
    latents: Int64[np.ndarray, " k"], generator: np.random.Generator
) -> Int64[np.ndarray, " k"]:
    """Give every latent another one of the list, each exactly once.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(latents) < 2:
        raise MonosemaError(f"latents must be at least two to be exchanged, got {len(latents)}")
    order = generator.permutation(len(latents))
    partner = np.empty_like(latents)
    partner[order] = latents[np.roll(order, 1)]
    return partner


class Mean(NamedTuple):
    """A mean over latents or images with its 95 % interval."""

    mean: float
    """The mean; nan over none."""
    low: float
    """Lower end; nan over fewer than two."""
    high: float
    """Upper end."""


def bootstrap_mean(values: Float64[np.ndarray, " k"], generator: np.random.Generator) -> Mean:
    """Mean with its percentile interval from 1,000 resamples of the latents."""
    if len(values) < 2:
        mean = float(values[0]) if len(values) else float("nan")
        return Mean(mean, float("nan"), float("nan"))
    picks = generator.integers(0, len(values), (1000, len(values)), dtype=np.int32)
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return Mean(float(values.mean()), float(low), float(high))


def flat(figures: Any) -> dict[str, object]:
    """Figures as JSON takes them: means and intervals as objects, nan as null."""
    return {f.name: plain(getattr(figures, f.name)) for f in dataclasses.fields(figures)}


def plain(value: object) -> object:
    """A figure, a mean, an interval, or several of them by name or in a row, as JSON takes it."""
    match value:
        case Mean() | Interval():
            return plain(value._asdict())
        case dict():
            return {str(key): plain(entry) for key, entry in value.items()}
        case tuple():
            return [known_or_none(float(number)) for number in value]
        case float():
            return known_or_none(value)
        case _:
            return value


def known_or_none(value: float) -> float | None:
    """The value; None in the place of nan."""
    return None if math.isnan(value) else float(value)
