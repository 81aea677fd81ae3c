"""What chance gives a label on unseen documents, and how its score depends on the activation.

The label is made; only the score split is looked at. Its null: the documents' texts are exchanged,
each turned by a random offset (`permuted_rows`), and the same rule is scored again. p is the share
of these scores, the observed one among them, that are as large; a label beats its null at 1 % where
p <= 0.01, and 1 % of labels that say nothing do.

A latent's weak firings are less specific than its strong ones (Templeton et al. 2024), and of how
many of them a dictionary has the AUC over all firings says more than of its labels. So the AUC of
the strongest tenth against the silent rows stands beside it, weak firings left out of both sides,
and the curve: the share of firings in each step of activation that the label's words explain.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from activations_cache.checks import Progress, silent
from sae.explain.config import ExplainConfig, Kind
from sae.explain.firings import Codes, concatenated_ranges
from sae.explain.labels import Labels, Rules
from sae.explain.scores import levels
from sae.explain.statistics import permuted_rows
from sae.explain.text_at_rows import RowText

STRONGEST = 0.1
"""Share of a latent's firings, by activation, that count as strong."""
LEAST_STRONG = 5
"""Fewer strong firings on the score split have no score."""
N_STEPS = 5
"""Equal steps of activation, from 0 to the latent's largest, of the curve."""

_ENTRIES_AT_ONCE = 1 << 22


class HeldOut(NamedTuple):
    """What the score split says of each label; nan, or 0, for latents that were not scored."""

    p_value: Float64[np.ndarray, " d_sae"]
    """Share of permuted texts on which the rule scores as well."""
    auc_strong: Float64[np.ndarray, " d_sae"]
    """AUC of the strongest tenth of the firings against the silent rows."""
    p_strong: Float64[np.ndarray, " d_sae"]
    """The same share for it."""
    n_strong: Int64[np.ndarray, " d_sae"]
    """Strong firings on the score split."""
    curve: Float64[np.ndarray, "d_sae step"]
    """Share of the firings in each step of activation with one of the label's words."""
    curve_n: Int64[np.ndarray, "d_sae step"]
    """Firings in each step."""
    base: Float64[np.ndarray, " d_sae"]
    """Share of all rows with one of the label's words: what the curve is if the label is void."""

    def beats(self, level: float, *, strong: bool = False) -> Bool[np.ndarray, " d_sae"]:
        """Which labels beat their null; a latent without a score does not."""
        p = self.p_strong if strong else self.p_value
        return np.nan_to_num(p, nan=np.inf) <= level


class _Chunk(NamedTuple):
    """Some latents with rules of one kind, and all their firings."""

    latent: np.ndarray
    rules: Rules
    level: np.ndarray  # (latent, word)
    rows_by_level: np.ndarray  # (latent, level): of all rows, firing or not
    row: np.ndarray  # of each firing
    start: np.ndarray  # first firing of each latent
    n_fired: np.ndarray
    is_strong: np.ndarray  # of each firing
    step: np.ndarray  # of each firing: its step of activation

    def firing(self, values: np.ndarray, chosen: np.ndarray | None) -> np.ndarray:
        """Firings, of the chosen ones, on rows with each level: (latent, level)."""
        at = values[self.row]
        result = np.zeros((len(self.latent), self.level.shape[1] + 1), np.int64)
        total = self.n_fired if chosen is None else _runs(chosen, self.start)
        each = np.arange(len(self.latent))
        for word in range(self.level.shape[1]):
            hit = at == np.repeat(self.rules.value[:, word], self.n_fired)
            hit &= at >= 0
            n = _runs(hit if chosen is None else hit & chosen, self.start)
            np.add.at(result, (each, self.level[:, word]), n)
        result[:, 0] += total - result.sum(axis=1)
        return result

    def auc(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Over all firings, and over the strong ones; ties count half."""
        fired = self.firing(values, None)
        strong = self.firing(values, self.is_strong)
        quiet = self.rows_by_level - fired
        below = (np.cumsum(quiet, axis=1) - quiet / 2) / quiet.sum(axis=1, keepdims=True)
        return (fired * below).sum(axis=1) / fired.sum(axis=1), (strong * below).sum(
            axis=1
        ) / np.maximum(strong.sum(axis=1), 1)


def _runs(flags: np.ndarray, start: np.ndarray) -> np.ndarray:
    return np.add.reduceat(flags, start, dtype=np.int64)


def strong_from(codes: Codes) -> Float64[np.ndarray, " d_sae"]:
    """The activation that a tenth of each latent's firings reach; inf where it never fires."""
    bars = np.full(codes.d_sae, np.inf)
    for latent in np.flatnonzero(codes.n_fired):
        bars[latent] = np.quantile(codes.of(int(latent)).values, 1 - STRONGEST)
    return bars


def held_out(
    labels: Labels,
    made_from: Codes,
    codes: Codes,
    text: RowText,
    wanted: Bool[np.ndarray, " d_sae"],
    config: ExplainConfig,
    progress: Progress | None = None,
) -> HeldOut:
    """Score rule i on the firings of latent i, and on permuted texts.

    Args:
        labels: One rule per latent.
        made_from: Firings on the explain split, which say what a strong activation is.
        codes: Firings on the score split.
        text: The text at its rows.
        wanted: Which latents; each must fire and be silent somewhere.
        config: How many permutations; 99 are the fewest that can show 1 %.
        progress: Called after each permutation.
    """
    report = progress or silent
    result = _empty(codes.d_sae)
    chunks = list(_chunks(labels, strong_from(made_from), codes, text, wanted))
    observed = {}
    for kind, chunk in chunks:
        values = text.values[kind]
        observed[id(chunk)] = chunk.auc(values)
        _fill(result, chunk, observed[id(chunk)][1], values)
    as_large = np.ones((2, codes.d_sae))
    for number in range(config.null_permutations):
        order = permuted_rows(text.example, np.random.default_rng([config.seed, number]))
        for kind, chunk in chunks:
            null = chunk.auc(text.values[kind][order])
            for side in range(2):
                as_large[side, chunk.latent] += null[side] >= observed[id(chunk)][side]
        report(number + 1, config.null_permutations, "permutations of the unseen texts")
    p = as_large / (config.null_permutations + 1)
    result.p_value[wanted] = p[0, wanted]
    is_known = np.isfinite(result.auc_strong)
    result.p_strong[is_known] = p[1, is_known]
    return result


def _empty(d_sae: int) -> HeldOut:
    nan = [np.full(d_sae, np.nan) for _ in range(4)]
    steps = (d_sae, N_STEPS)
    zeros = np.zeros(d_sae, np.int64), np.full(steps, np.nan), np.zeros(steps, np.int64)
    return HeldOut(nan[0], nan[1], nan[2], *zeros, nan[3])


def _chunks(
    labels: Labels, bars: np.ndarray, codes: Codes, text: RowText, wanted: np.ndarray
) -> Iterator[tuple[Kind, _Chunk]]:
    rules = labels.rules
    for number, kind in enumerate(labels.kinds):
        latents = np.flatnonzero(wanted & (rules.kind == number))
        values = text.values[kind]
        n_rows = np.bincount(values[values >= 0], minlength=int(rules.value.max(initial=0)) + 1)
        ends = np.cumsum(codes.n_fired[latents]) // _ENTRIES_AT_ONCE
        for part in np.split(latents, np.flatnonzero(np.diff(ends)) + 1):
            if len(part):
                yield kind, _chunk(part, rules.of(part), n_rows, codes, bars[part])


def _chunk(
    latents: np.ndarray, rules: Rules, n_rows: np.ndarray, codes: Codes, bars: np.ndarray
) -> _Chunk:
    n_fired = codes.n_fired[latents]
    start = np.cumsum(n_fired) - n_fired
    entry = concatenated_ranges(codes.start[latents], n_fired)
    value = codes.value[entry]
    largest = np.maximum.reduceat(value, start)
    share = value / np.repeat(largest, n_fired)
    step = np.clip(np.ceil(share * N_STEPS).astype(np.int64) - 1, 0, N_STEPS - 1)
    level = levels(rules)
    by_level = np.zeros((len(latents), level.shape[1] + 1), np.int64)
    count = np.where(rules.value >= 0, n_rows[rules.value], 0)
    for word in range(level.shape[1]):
        np.add.at(by_level, (np.arange(len(latents)), level[:, word]), count[:, word])
    by_level[:, 0] += codes.n_rows - by_level.sum(axis=1)
    return _Chunk(
        latents, rules, level, by_level, codes.row[entry], start, n_fired,
        value >= np.repeat(bars, n_fired), step,
    )  # fmt: skip


def _fill(result: HeldOut, chunk: _Chunk, auc_strong: np.ndarray, values: np.ndarray) -> None:
    """Everything that needs no permutation."""
    latent = chunk.latent
    n_strong = _runs(chunk.is_strong, chunk.start)
    result.n_strong[latent] = n_strong
    result.auc_strong[latent] = np.where(n_strong >= LEAST_STRONG, auc_strong, np.nan)
    for step in range(N_STEPS):
        inside = chunk.step == step
        n = _runs(inside, chunk.start)
        explained = chunk.firing(values, inside)[:, 1:].sum(axis=1)
        result.curve_n[latent, step] = n
        result.curve[latent, step] = np.where(n > 0, explained / np.maximum(n, 1), np.nan)
    result.base[latent] = chunk.rows_by_level[:, 1:].sum(axis=1) / chunk.rows_by_level.sum(axis=1)
