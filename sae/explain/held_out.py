"""What chance gives a label on unseen documents, and how its score depends on the activation.

The label is made; only the score split is looked at. Its null: the documents' texts are exchanged,
each turned by a random offset (`permuted_rows`), and the same rule is scored again. p is the share
of these scores, the observed one among them, that are as large; a label beats its null at 1 % where
p <= 0.01, and 1 % of labels that say nothing do.

A latent's weak firings are less specific than its strong ones (Templeton et al. 2024), and of how
many of them a dictionary has the AUC over all firings says more than of its labels. So the AUC of
the strongest tenth against the silent rows stands beside it, weak firings left out of both sides,
and the curve: the share of firings in each step of activation that the label's words explain.

`concepts_with_a_latent` asks which concepts a dictionary has: for each one the latent is chosen on
the explain split, and whether it singles the concept out is seen on the score split.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy import sparse

from activations_cache.checks import Progress, silent
from monosema.checks import MonosemaError
from sae.explain.config import ExplainConfig, Kind
from sae.explain.examples import N_FIFTHS, SplitFirings
from sae.explain.firings import CAUTION, Codes, concatenated_ranges
from sae.explain.labels import Labels, Rules, completeness
from sae.explain.scores import levels
from sae.explain.statistics import permuted_rows
from sae.explain.text_at_rows import Concept, RowText
from sae.explain.windows import shuffled

STRONGEST = 0.1
"""Share of a latent's firings, by activation, that count as strong."""
LEAST_STRONG = 5
"""Fewer strong firings on the score split have no score."""

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
    steps = (d_sae, N_FIFTHS)
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
    step = np.clip(np.ceil(share * N_FIFTHS).astype(np.int64) - 1, 0, N_FIFTHS - 1)
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
    for step in range(N_FIFTHS):
        inside = chunk.step == step
        n = _runs(inside, chunk.start)
        explained = chunk.firing(values, inside)[:, 1:].sum(axis=1)
        result.curve_n[latent, step] = n
        result.curve[latent, step] = np.where(n > 0, explained / np.maximum(n, 1), np.nan)
    result.base[latent] = chunk.rows_by_level[:, 1:].sum(axis=1) / chunk.rows_by_level.sum(axis=1)


SINGLES_OUT = 0.5
"""A latent singles a concept out if, on the score split, it fires on at least this share of its
rows, and at least this share of its firings are on them."""
SHARES = (0.0, 0.25, 0.5)
"""Of a latent's largest activation: what it must reach to count as firing, chosen with it."""
LEAST_ROWS = 5
"""A concept on fewer rows of either split is not asked for."""
_BINS, _LATENTS_AT_ONCE = 10, 1024
PROXY = (
    "a concept is the words of a family; a word stands for an idea as a proxy alone; what glosses "
    "are about has a row by family and is not in the curve; latents were chosen on other documents"
)


class Found(NamedTuple):
    """Of each concept the latent that tells it best, and how well it does on unseen documents."""

    frequency: Float64[np.ndarray, " word"]
    """Share of the rows of both splits."""
    latent: Int64[np.ndarray, " word"]
    precision: Float64[np.ndarray, " word"]
    """Share of its firings that are on the concept."""
    recall: Float64[np.ndarray, " word"]
    """Share of the concept's rows on which it fires."""

    @property
    def present(self) -> Bool[np.ndarray, " word"]:
        """Whether it singles the concept out."""
        return np.minimum(self.precision, self.recall) >= SINGLES_OUT


def asked_for(
    concepts: Sequence[Concept], texts: Sequence[RowText], n: int
) -> tuple[list[Concept], list[sparse.csc_array]]:
    """At most n concepts that both splits have, evenly over log frequency; their rows by split.

    Args:
        concepts: All that there are; those of safety and of glosses are taken first.
        texts: Of the explain and the score split.
        n: How many.
    """
    tables = [_rows_of(concepts, text) for text in texts]
    counts = np.array([np.diff(table.indptr) for table in tables])
    known = np.flatnonzero((counts >= LEAST_ROWS).all(axis=0))
    if not len(known):
        return [], [table[:, known] for table in tables]
    f = np.log(counts[:, known].sum(axis=0))
    edges = np.linspace(f.min(), f.max(), _BINS + 1)[1:-1]
    place, taken = defaultdict(int), {}
    for i in shuffled(range(len(known)), "concepts"):
        concept, step = concepts[known[i]], int(np.digitize(f[i], edges))
        place[step] += 1
        taken[i] = -1 if concept.safety or concept.kind == "supersense" else place[step]
    chosen = known[sorted(sorted(taken, key=taken.__getitem__)[:n])]
    return [concepts[i] for i in chosen], [table[:, chosen] for table in tables]


def _rows_of(concepts: Sequence[Concept], text: RowText) -> sparse.csc_array:
    """Rows by concepts: 1 where a row has one of its values."""
    total = sparse.csr_array((text.n_rows, len(concepts)), dtype=np.int32)
    kinds: list[Kind] = list(dict.fromkeys(concept.kind for concept in concepts))
    for kind in kinds:
        values = text.values[kind]
        has = np.flatnonzero(values >= 0)
        pairs = [(v, i) for i, c in enumerate(concepts) if c.kind == kind for v in c.values]
        value, concept = np.array(pairs, np.int64).T
        n_values = 1 + max(int(values.max(initial=0)), int(value.max()))
        of_value = (np.ones(len(value), np.int32), (value, concept))
        table = sparse.csr_array(of_value, shape=(n_values, len(concepts)))
        at = (np.ones(len(has), np.int32), (has, values[has]))
        total = total + sparse.csr_array(at, shape=(text.n_rows, n_values)) @ table
    return sparse.csc_array(total)


def find_concepts(
    codes: tuple[Codes, Codes], tables: Sequence[sparse.csc_array], progress: Progress | None = None
) -> Found:
    """Choose each concept's latent by F1 on the explain split; score it on the other.

    Codes and tables (rows by concepts) are of the explain split, then of the score split.
    """
    report, (made_from, unseen) = progress or silent, codes
    n_rows = np.diff(tables[0].indptr)
    best = np.full(len(n_rows), -1.0)
    latent, bar = np.zeros(len(n_rows), np.int64), np.zeros(len(n_rows))
    for first in range(0, made_from.d_sae, _LATENTS_AT_ONCE):
        part = made_from.part(first, min(first + _LATENTS_AT_ONCE, made_from.d_sae))
        group = np.repeat(np.arange(part.d_sae), part.n_fired)
        largest = np.zeros(part.d_sae, np.float32)
        np.maximum.at(largest, group, part.value)
        for share in SHARES:
            fires = part.value >= share * largest[group]
            ones = (np.ones(int(fires.sum()), np.int32), (group[fires], part.row[fires]))
            table = sparse.csr_array(ones, shape=(part.d_sae, part.n_rows))
            joint = sparse.csr_array(table @ tables[0]).toarray()
            n_fired = np.bincount(group[fires], minlength=part.d_sae)
            f1 = 2 * joint / (n_fired[:, None] + n_rows[None, :])
            at, value = f1.argmax(axis=0), f1.max(axis=0)
            better = value > best
            best[better], latent[better] = value[better], first + at[better]
            bar[better] = share * largest[at[better]]
        report(first + part.d_sae, made_from.d_sae, "latents searched for concepts")
    at = zip(latent.tolist(), bar.tolist(), strict=True)
    scores = [_on(unseen, tables[1], i, *of_one) for i, of_one in enumerate(at)]
    precision, recall = np.array(scores, np.float64).reshape(-1, 2).T
    total = n_rows + np.diff(tables[1].indptr)
    return Found(total / (made_from.n_rows + unseen.n_rows), latent, precision, recall)


def _on(
    codes: Codes, table: sparse.csc_array, concept: int, latent: int, bar: float
) -> tuple[float, float]:
    """Precision and recall of a latent's firings from a bar on."""
    firings = codes.of(latent)
    fires = firings.rows[firings.values >= bar]
    rows = table[:, [concept]].indices
    both = len(np.intersect1d(fires, rows))
    return both / max(len(fires), 1), both / max(len(rows), 1)


def concepts_with_a_latent(
    concepts: Sequence[Concept],
    parts: Sequence[SplitFirings],
    n: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit whether a concept has a latent that singles it out against how frequent it is.

    Args:
        concepts: All that there are; at most n of them are asked for.
        parts: Firings on the explain split and on the score split.
        n: Most concepts.
        progress: Called while it runs.

    Returns:
        The fit, or the reason why there is none; points, families, and what is known of safety.
    """
    chosen, tables = asked_for(concepts, [part.text for part in parts], n)
    codes = (parts[0].codes, parts[1].codes)
    found = find_concepts(codes, tables, progress)
    n_alive = int((codes[0].n_fired + codes[1].n_fired > 0).sum())
    of_words = np.array([concept.kind == "word" for concept in chosen], bool)
    frequency, present = found.frequency[of_words], found.present[of_words]
    result: dict[str, Any] = {
        "points": _points(frequency, present),
        "families": _by_family(chosen, found.present),
        "note": PROXY,
    }
    if any(concept.safety for concept in chosen):
        result["safety"] = [
            {"concept": c.name, "family": c.family, "latent": int(found.latent[i]),
             "precision": float(found.precision[i]), "recall": float(found.recall[i])}
            for i, c in enumerate(chosen) if c.safety
        ]  # fmt: skip
        result["caution"] = CAUTION
    try:
        fit = completeness(frequency, present, n_alive)
    except MonosemaError as error:
        share = float(present.mean()) if len(present) else 0.0
        return {"reason": str(error), "n": len(present), "share_present": share, **result}
    return {**fit._asdict(), **result}


def _by_family(concepts: Sequence[Concept], present: np.ndarray) -> dict[str, Any]:
    families: dict[str, list[bool]] = defaultdict(list)
    for concept, is_present in zip(concepts, present.tolist(), strict=True):
        families[concept.family].append(is_present)
    shares = {name: (len(each), sum(each) / len(each)) for name, each in sorted(families.items())}
    return {name: {"n": n, "share_present": share} for name, (n, share) in shares.items()}


def _points(frequency: np.ndarray, has: np.ndarray) -> list[list[float]]:
    """Frequency, share with a latent and number of the concepts of each tenth by frequency."""
    order = np.argsort(frequency, kind="stable")
    return [
        [float(np.exp(np.log(frequency[part]).mean())), float(has[part].mean()), float(len(part))]
        for part in np.array_split(order, _BINS)
        if len(part)
    ]
