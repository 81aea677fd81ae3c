"""Labels as executable rules: for every latent the few words of one kind that tell most about it.

All kinds compete. A kind's gain is the information of its rule, the best `words_per_label` words
or none of them, minus what the same search finds on permuted texts. The kind with the largest gain
makes the label, or the first of those within 5 % of it: a word rather than its spellings. The rule
gives a row that has a listed word the shrunken frequency with which the latent fires there, and a
row without one the least score.

`completeness` says which concepts have a latent, as a function of how frequent they are (Templeton
et al. 2024).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64
from scipy import special

from activations_cache.checks import Progress, silent
from monosema.checks import MonosemaError
from sae.explain.config import ExplainConfig, Kind
from sae.explain.firings import Codes
from sae.explain.statistics import (
    Chance,
    TopWords,
    normalised_pmi,
    p_values,
    permuted_rows,
    rule_information,
    top_words,
)
from sae.explain.text_at_rows import RowText

_PREFIX: Mapping[Kind, str] = {
    "word": "word: ",
    "previous word": "after ",
    "word pair": "words: ",
    "token": "token: ",
    "supersense": "glosses about ",
    "source": "source: ",
    "position": "position in text: ",
}
_QUOTED: tuple[Kind, ...] = ("word", "previous word", "word pair", "token")
_NEAR = 0.95
_RATIOS = 1200
_MOST_PERMUTATIONS = 100


@dataclass(frozen=True)
class Rules:
    """One rule per latent: a kind, the values it lists and the score of each."""

    kind: Int64[np.ndarray, " d_sae"]
    """Index into the kinds of the config."""
    value: Int32[np.ndarray, "d_sae word"]
    """Listed values of that kind, best first; -1 where there are no more."""
    weight: Float64[np.ndarray, "d_sae word"]
    """Shrunken p(fires | value), the rule's score of a row with this value; 0 where none."""

    def of(self, latents: Int64[np.ndarray, " k"]) -> "Rules":
        """The rules of these latents, in this order."""
        return Rules(self.kind[latents], self.value[latents], self.weight[latents])


@dataclass(frozen=True)
class Labels:
    """The labels of all latents and what they rest on; only the explain split was looked at."""

    kinds: tuple[Kind, ...]
    """What `kind` of the rules indexes."""
    rules: Rules
    """The labels as rules."""
    wide: Rules
    """Larger rules of the same kinds, for comparison."""
    eligible: Bool[np.ndarray, " d_sae"]
    """Whether the latent fires often enough in the explain split; the others have no words."""
    joint: Int64[np.ndarray, "d_sae word"]
    """Rows with the word on which the latent fires."""
    information: Float64[np.ndarray, "d_sae word"]
    """Mutual information of the latent and each word alone, in nats."""
    npmi: Float64[np.ndarray, "d_sae word"]
    """Normalised pointwise mutual information of the latent and each word."""
    gain: Float64[np.ndarray, " d_sae"]
    """Information of the rule minus the mean of its permuted copies, in nats."""
    p_value: Float64[np.ndarray, " d_sae"]
    """Share of chance rules as informative, times the number of kinds that competed."""

    def words(self, latent: int, names: Mapping[Kind, Sequence[str]]) -> list[str]:
        """The words of a label."""
        known = names[self.kinds[self.rules.kind[latent]]]
        return [known[int(value)] for value in self.rules.value[latent] if value >= 0]

    def text(self, latent: int, names: Mapping[Kind, Sequence[str]]) -> str:
        """The label as text, such as `word: "handsome", "clever"`; empty without words."""
        kind = self.kinds[self.rules.kind[latent]]
        words = self.words(latent, names)
        if kind in _QUOTED:
            words = [json.dumps(word, ensure_ascii=False) for word in words]
        return _PREFIX[kind] + ", ".join(words) if words else ""


class _Candidate(NamedTuple):
    """What one kind offers for every latent."""

    top: TopWords
    gain: np.ndarray
    p_value: np.ndarray
    best_by_chance: np.ndarray


def fires_enough(codes: Codes, text: RowText, config: ExplainConfig) -> Bool[np.ndarray, " d_sae"]:
    """Whether each latent fires on enough rows, in enough examples, and is silent on enough."""
    return (
        (codes.n_fired >= config.min_firings)
        & (n_examples(codes, text) >= config.min_examples)
        & (codes.n_rows - codes.n_fired >= config.min_firings)
    )


def n_examples(codes: Codes, text: RowText) -> Int64[np.ndarray, " d_sae"]:
    """In how many examples each latent fires."""
    example = text.example[codes.row]
    fires = codes.n_fired > 0
    begins = np.ones(len(example), bool)
    begins[1:] = example[1:] != example[:-1]
    begins[codes.start[fires]] = True
    count = np.zeros(codes.d_sae, np.int64)
    if fires.any():
        count[fires] = np.add.reduceat(begins, codes.start[fires], dtype=np.int64)
    return count


def make_labels(
    codes: Codes, text: RowText, config: ExplainConfig, progress: Progress | None = None
) -> Labels:
    """Label every latent from the rows of the explain split.

    Args:
        codes: Firings on these rows.
        text: The text at these rows.
        config: How.
        progress: Called after each pass over the codes.

    Returns:
        Labels; equal for equal input.
    """
    eligible = fires_enough(codes, text, config)
    n_permutations = _n_permutations(config.permutations, int(eligible.sum()))
    counter = _Counter(progress or silent, len(config.kinds) * (1 + n_permutations))
    generator = np.random.default_rng(config.seed)
    orders = [permuted_rows(text.example, generator) for _ in range(n_permutations)]
    candidates = [
        _candidate(codes, text.values[kind], orders, config, eligible, counter)
        for kind in config.kinds
    ]
    gains = np.stack([candidate.gain for candidate in candidates])
    near = gains >= _NEAR * gains.max(axis=0)
    kind = np.where(gains.max(axis=0) > 0, near.argmax(axis=0), gains.argmax(axis=0))
    return _labels(candidates, kind, codes, config, eligible)


def _n_permutations(least: int, n_latents: int) -> int:
    """More where latents are few: all together they must give enough chance rules to compare."""
    return max(least, min(_RATIOS // max(n_latents, 1), _MOST_PERMUTATIONS))


class _Counter:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def advance(self) -> None:
        self._done += 1
        self._progress(self._done, self._total, "passes over the text")


def _candidate(
    codes: Codes,
    values: np.ndarray,
    orders: list[np.ndarray],
    config: ExplainConfig,
    eligible: np.ndarray,
    counter: _Counter,
) -> _Candidate:
    top = top_words(codes, values, config.wide_words, config.min_word_count)
    counter.advance()
    observed = _information(codes, top.first(config.words_per_label))
    chance = _chance(codes, values, orders, config, counter)
    p = p_values(observed, chance.rule, codes, eligible)
    return _Candidate(top, observed - chance.rule.mean(axis=1), p, chance.best.max(axis=1))


def _chance(
    codes: Codes,
    values: np.ndarray,
    orders: list[np.ndarray],
    config: ExplainConfig,
    counter: _Counter,
) -> Chance:
    rule = np.zeros((codes.d_sae, len(orders)))
    best = np.zeros_like(rule)
    for column, order in enumerate(orders):
        top = top_words(codes, values[order], config.words_per_label, config.min_word_count)
        rule[:, column] = _information(codes, top)
        best[:, column] = top.information[:, 0]
        counter.advance()
    return Chance(rule, best)


def _information(codes: Codes, top: TopWords) -> np.ndarray:
    return rule_information(top.joint, top.present, codes.n_fired, codes.n_rows)


def _labels(
    candidates: list[_Candidate],
    kind: np.ndarray,
    codes: Codes,
    config: ExplainConfig,
    eligible: np.ndarray,
) -> Labels:
    every = np.arange(codes.d_sae)
    top = TopWords(
        *(np.stack([c.top[field] for c in candidates])[kind, every] for field in range(4))
    )
    ceiling = np.stack([c.best_by_chance for c in candidates])[kind, every]
    label = _listed(top.first(config.words_per_label), ceiling, eligible)
    present = np.where(label.value >= 0, label.present, 1)
    fired = codes.n_fired[:, None]
    npmi = normalised_pmi(label.joint, fired, present, codes.n_rows)
    p = np.stack([c.p_value for c in candidates])[kind, every]
    return Labels(
        kinds=config.kinds,
        rules=_rules(label, kind, codes, config.prior_rows),
        wide=_rules(_listed(top, np.zeros_like(ceiling), eligible), kind, codes, config.prior_rows),
        eligible=eligible,
        joint=label.joint,
        information=label.information,
        npmi=np.where(label.value >= 0, npmi, 0.0),
        gain=np.stack([c.gain for c in candidates])[kind, every],
        p_value=np.minimum(p * len(candidates), 1.0),
    )


def _listed(top: TopWords, ceiling: np.ndarray, eligible: np.ndarray) -> TopWords:
    """Keep what tells more than the best word of any permuted text, and always the best word."""
    listed = top.information > ceiling[:, None]
    listed[:, 0] = True
    listed &= eligible[:, None]
    return TopWords(
        np.where(listed, top.value, np.int32(-1)),
        *(np.where(listed, array, array.dtype.type(0)) for array in top[1:]),
    )


def _rules(top: TopWords, kind: np.ndarray, codes: Codes, prior_rows: float) -> Rules:
    rate = codes.n_fired[:, None] / codes.n_rows
    weight = (top.joint + prior_rows * rate) / (top.present + prior_rows)
    return Rules(kind, top.value, np.where(top.value >= 0, weight, 0.0))


_STEPS = 60
_PRIOR = 0.01
"""A slope of 10 standard deviations is as good as a step; without a prior it is infinite."""


class CompletenessFit(NamedTuple):
    """A logistic curve over log frequency: P(present) = 1 / (1 + exp(-slope (log f - log f50)))."""

    f50: float
    """Frequency at which half of the concepts have a latent."""
    low: float
    """Lower end of its 95 % interval, by bootstrap over concepts."""
    high: float
    """Upper end."""
    slope: float
    """Steepness per nat of frequency."""
    times_alive: float
    """f50 times the number of live latents; about 1 in Scaling Monosemanticity."""
    n: int
    """Concepts."""
    share_present: float
    """Share of them that have a latent."""


def completeness(
    frequency: Float64[np.ndarray, " word"],
    present: Bool[np.ndarray, " word"],
    n_alive: int,
    *,
    seed: int = 0,
    resamples: int = 200,
) -> CompletenessFit:
    """Fit the curve by maximum likelihood with a weak prior on the slope.

    Args:
        frequency: Share of the corpus, above 0, of each concept.
        present: Whether the dictionary has a latent that singles it out.
        n_alive: Live latents.
        seed: Of the bootstrap.
        resamples: Of it.

    Raises:
        ValueError: If there are fewer than 10 concepts, or all or none of them are present: then
            the data hold no 50 % point.
    """
    if len(frequency) < 10 or not (frequency > 0).all():
        raise MonosemaError(
            f"frequency must be at least 10 numbers above 0, got {len(frequency)} of which "
            f"{int((frequency > 0).sum())} are"
        )
    if present.all() or not present.any():
        n_present = int(present.sum())
        raise MonosemaError(
            f"present must hold both for a 50 % point, got {n_present} of {len(present)}; "
            "add rarer or more frequent concepts"
        )
    x = np.log(frequency)
    middle, slope = _fit(x, present, np.ones((1, len(x))))
    made = np.random.default_rng(seed)
    weights = made.multinomial(len(x), np.full(len(x), 1 / len(x)), resamples)
    has_both = (weights[:, present].sum(1) > 0) & (weights[:, ~present].sum(1) > 0)
    points, _ = _fit(x, present, weights[has_both].astype(np.float64))
    low, high = np.quantile(points, [0.025, 0.975])
    middle, slope = float(middle[0]), float(slope[0])
    f50 = math.exp(middle)
    return CompletenessFit(
        f50, math.exp(low), math.exp(high), slope, f50 * n_alive, len(x), float(present.mean())
    )


def _fit(x: np.ndarray, present: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half-way points and slopes, one for each row of weights, by Newton's method."""
    centre, spread = x.mean(), max(float(x.std()), 1e-9)
    z, y = (x - centre) / spread, present.astype(np.float64)
    a, b = np.zeros(len(weights)), np.ones(len(weights))
    for _ in range(_STEPS):
        p = special.expit(a[:, None] + b[:, None] * z)
        h = weights * p * (1 - p)
        ga = (weights * (y - p)).sum(1) - a * _PRIOR
        gb = (weights * (y - p) * z).sum(1) - b * _PRIOR
        haa, hab, hbb = h.sum(1) + _PRIOR, (h * z).sum(1), (h * z * z).sum(1) + _PRIOR
        det = haa * hbb - hab * hab
        a = a + np.clip((hbb * ga - hab * gb) / det, -2, 2)
        b = b + np.clip((haa * gb - hab * ga) / det, -2, 2)
    b = np.where(np.abs(b) > 1e-9, b, 1e-9)
    return centre - spread * a / b, b / spread
