"""Which words go with which latents, in nats, and how much of that chance alone would give.

A latent fires or not (c) and a row has a word or not (w): four counts, from which the mutual
information I(c; w) in nats is exact. "Word" stands for a value of any kind: a token, a source, ...
Chance is taken from permuted copies of the text. Firing and words both come in bursts within an
example, so whole examples are permuted, each turned by a random offset so that equal positions do
not meet; rows one by one would make chance look far too small.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from sae.explain.firings import Codes

_CELLS = 1 << 18  # of the table latents x words that is held at once: 2 MB, which stays in cache
_LEAST_JOINT = 2  # a word met once with the latent is no evidence


def xlogx(count: np.ndarray) -> np.ndarray:
    """Count times its logarithm, 0 at 0."""
    return count * np.log(np.maximum(count, 1))


def mutual_information(
    joint: np.ndarray, fired: np.ndarray, present: np.ndarray, n_rows: int
) -> np.ndarray:
    """Signed mutual information of firing and word in nats; arrays broadcast.

    Args:
        joint: Rows with the word on which the latent fires.
        fired: Rows on which it fires.
        present: Rows with the word.
        n_rows: All rows.

    Returns:
        I(c; w), negative where the two avoid each other.
    """
    rest = n_rows - fired - present + joint
    counted = xlogx(joint) + xlogx(fired - joint) + xlogx(present - joint) + xlogx(rest)
    fired_part = xlogx(fired) + xlogx(n_rows - fired)
    present_part = xlogx(present) + xlogx(n_rows - present)
    nats = (counted - fired_part - present_part + n_rows * np.log(n_rows)) / n_rows
    attract = joint * float(n_rows) >= fired * present
    return np.where(attract, 1.0, -1.0) * np.maximum(nats, 0.0)


def normalised_pmi(
    joint: np.ndarray, fired: np.ndarray, present: np.ndarray, n_rows: int
) -> np.ndarray:
    """log(p(c, w) / p(c) p(w)) / -log p(c, w), between -1 (never together) and 1 (always)."""
    safe = np.maximum(joint, 1)
    pmi = np.log(safe * float(n_rows)) - np.log(np.maximum(fired * present, 1))
    surprise = np.maximum(-np.log(safe / n_rows), 1e-12)
    return np.where(joint > 0, np.clip(pmi / surprise, -1.0, 1.0), -1.0)


def rule_information(
    joint: Int64[np.ndarray, "d_sae word"],
    present: Int64[np.ndarray, "d_sae word"],
    fired: Int64[np.ndarray, " d_sae"],
    n_rows: int,
) -> Float64[np.ndarray, " d_sae"]:
    """Mutual information of firing with "which of these words, or none of them", in nats.

    The words of one latent exclude one another, as the values of one kind do; a word that is not
    there has counts 0.
    """
    silent = present - joint
    by_word = (xlogx(joint) + xlogx(silent) - xlogx(present)).sum(axis=1)
    other_joint = fired - joint.sum(axis=1)
    other = n_rows - present.sum(axis=1)
    others = xlogx(other_joint) + xlogx(other - other_joint) - xlogx(other)
    fired_part = xlogx(fired) + xlogx(n_rows - fired) - n_rows * np.log(n_rows)
    return np.maximum((by_word + others - fired_part) / n_rows, 0.0)


class TopWords(NamedTuple):
    """The words of one kind that tell most about each latent, best first."""

    value: Int32[np.ndarray, "d_sae word"]
    """Index of the word; -1 where there are no more."""
    joint: Int64[np.ndarray, "d_sae word"]
    """Rows with the word on which the latent fires."""
    present: Int64[np.ndarray, "d_sae word"]
    """Rows with the word."""
    information: Float64[np.ndarray, "d_sae word"]
    """I(c; w) in nats; only words that attract are listed, so it is above 0."""

    def first(self, n_words: int) -> "TopWords":
        """The best `n_words` of them."""
        return TopWords(*(array[:, :n_words] for array in self))


def top_words(
    codes: Codes, values: Int32[np.ndarray, " row"], n_words: int, min_count: int
) -> TopWords:
    """Find for every latent the `n_words` values with the largest positive information.

    Args:
        codes: Firings on the rows.
        values: Value of each row, -1 for none.
        n_words: How many are wanted.
        min_count: Values of fewer rows are left out.

    Returns:
        The best values; equal ones in the order of their index.
    """
    present = np.bincount(values[values >= 0], minlength=1)
    frequent = np.flatnonzero(present >= min_count)
    narrow = np.full(
        len(present) + 1, len(frequent), np.int32
    )  # the last column takes what is left out
    narrow[frequent] = np.arange(len(frequent))
    columns = narrow[values]
    shape = (codes.d_sae, n_words)
    result = TopWords(
        np.full(shape, -1, np.int32), np.zeros(shape, np.int64), np.zeros(shape, np.int64),
        np.zeros(shape),
    )  # fmt: skip
    step = max(1, _CELLS // (len(frequent) + 1))
    for first in range(0, codes.d_sae if len(frequent) else 0, step):
        last = min(first + step, codes.d_sae)
        joint = _joint_counts(codes, columns, len(frequent), first, last)
        part = TopWords(*(array[first:last] for array in result))
        _fill_best(part, joint, codes.n_fired[first:last], present[frequent], codes.n_rows)
    result.value[:] = np.where(
        result.value >= 0, frequent[result.value] if len(frequent) else -1, -1
    )
    return result


def _joint_counts(
    codes: Codes, columns: np.ndarray, n_columns: int, first: int, last: int
) -> np.ndarray:
    entries = codes.block(first, last)
    cell = entries.group * (n_columns + 1) + columns[entries.row]
    counts = np.bincount(cell, minlength=(last - first) * (n_columns + 1))
    return counts.reshape(last - first, n_columns + 1)[:, :n_columns]


def _fill_best(
    part: TopWords, joint: np.ndarray, fired: np.ndarray, present: np.ndarray, n_rows: int
) -> None:
    """Write the best columns into `part`, which views the arrays of the whole."""
    latent, column = np.nonzero(joint >= _LEAST_JOINT)
    nats = mutual_information(joint[latent, column], fired[latent], present[column], n_rows)
    table = np.zeros(joint.shape)
    table[latent, column] = nats
    every = np.arange(len(joint))
    for rank in range(min(part.value.shape[1], joint.shape[1])):
        best = table.argmax(axis=1)  # the first of equals, so the order is the same everywhere
        nats = table[every, best]
        table[every, best] = 0.0
        attracts = nats > 0
        if not attracts.any():
            break
        part.value[:, rank] = np.where(attracts, best, -1)
        part.joint[:, rank] = np.where(attracts, joint[every, best], 0)
        part.present[:, rank] = np.where(attracts, present[best], 0)
        part.information[:, rank] = np.where(attracts, nats, 0.0)


def permuted_rows(
    example: Int32[np.ndarray, " row"], generator: np.random.Generator
) -> Int64[np.ndarray, " row"]:
    """A permutation of rows that keeps the rows of an example together and in cyclic order.

    Args:
        example: Example of each row, ascending.
        generator: Picks the order of the examples and the turn of each.
    """
    lengths = np.diff(np.flatnonzero(np.diff(example, prepend=-1, append=example[-1] + 1)))
    starts = np.cumsum(lengths) - lengths
    order = generator.permutation(len(lengths))
    lengths, starts = lengths[order], starts[order]
    place = np.arange(len(example)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    turn = generator.integers(0, lengths)
    return np.repeat(starts, lengths) + (place + np.repeat(turn, lengths)) % np.repeat(
        lengths, lengths
    )


class Chance(NamedTuple):
    """What the labels of permuted texts reach, one column per permutation."""

    rule: Float64[np.ndarray, "d_sae permutation"]
    """Information of the rule of the best words, in nats."""
    best: Float64[np.ndarray, "d_sae permutation"]
    """Information of the best word alone."""


def p_values(
    observed: Float64[np.ndarray, " d_sae"],
    chance: Float64[np.ndarray, "d_sae permutation"],
    codes: Codes,
    eligible: Bool[np.ndarray, " d_sae"],
) -> Float64[np.ndarray, " d_sae"]:
    """How often chance alone gives a rule as informative, compared with the latent's own chance.

    Each latent's information is divided by the mean over its permutations; each permutation's by
    the mean over the other ones. Without an association all these ratios are alike, so a latent's
    p is the share of ratios as large as its own among those of latents that fire about as often:
    a quarter of them, or all where they are few. The search over words is in both sides; that
    there are many latents is not allowed for.

    Returns:
        p between 1 / (number of ratios + 1) and 1; 1 for latents that are not eligible.
    """
    floor = 1.0 / codes.n_rows
    n = chance.shape[1]
    others = (chance.sum(axis=1, keepdims=True) - chance) / (n - 1)
    null = (chance + floor) / (others + floor)
    ratio = (observed + floor) / (chance.mean(axis=1) + floor)
    p = np.ones(len(observed))
    latents = np.flatnonzero(eligible)
    latents = latents[np.argsort(codes.n_fired[latents], kind="stable")]
    for group in np.array_split(latents, max(1, min(len(latents) // 256, 4))):
        pool = np.sort(null[group].ravel())
        as_large = len(pool) - np.searchsorted(pool, ratio[group], side="left")
        p[group] = (1 + as_large) / (1 + len(pool))
    return p
