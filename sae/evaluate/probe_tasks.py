"""Tasks from a labelled cache: tokens of a gloss, images of a class, rows of any labelled text.

What probes read: a matrix of units over rows, sparse for dictionaries.

How the concepts that rows are labelled with lie along the rows' principal directions.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from activations_cache.reader import ActivationCache
from monosema.checks import MonosemaError
from sae.autoencoder import SparseAutoencoder
from sae.baselines import random_dictionary
from sae.evaluate.geometry import Pruned, encoded_concepts, pruned

Units: TypeAlias = scipy.sparse.csr_matrix | np.ndarray
"""(row, unit)."""

Arm = Callable[[Float[Tensor, "row d_in"]], Units]
"""From rows to what a probe may read."""

ROWS_AT_ONCE = 4096


class Task(NamedTuple):
    """A binary property of rows, with the rows to fit on and others to score on."""

    train_x: Float[Tensor, "row d_in"]
    train_y: Bool[np.ndarray, " row"]
    test_x: Float[Tensor, "other d_in"]
    test_y: Bool[np.ndarray, " other"]
    test_group: Int[np.ndarray, " other"]
    """What is independent of each other among the rows to score on, such as their examples."""
    types: tuple[Int[np.ndarray, " row"], Int[np.ndarray, " other"]] | None = None
    """What a control task gives a label each, of both sides: the rows' tokens."""


def check_two_classes(y: Bool[np.ndarray, " row"], what: str) -> None:
    """Refuse labels that say nothing.

    Raises:
        ValueError: If all are the same.
    """
    n_true = int(y.sum())
    if n_true in {0, len(y)}:
        raise MonosemaError(
            f"{what} must have both classes, got {n_true} positive of {len(y)}; "
            "take another label or more rows"
        )


def codes_of(dictionary: SparseAutoencoder) -> Arm:
    """An arm that reads a dictionary's latents."""

    @torch.no_grad()
    def read(x: Float[Tensor, "row d_in"]) -> Units:
        parts = []
        for part in x.split(ROWS_AT_ONCE):
            latents = dictionary.encode(part.to(dictionary.dec_rows.device))
            fires = latents.values != 0
            row = fires.nonzero()[:, 0].cpu().numpy()
            entries = latents.values[fires].cpu().numpy(), (row, latents.indices[fires].cpu())
            shape = (len(part), dictionary.config.d_sae)
            parts.append(scipy.sparse.csr_matrix(entries, shape=shape))
        return scipy.sparse.csr_matrix(scipy.sparse.vstack(parts))

    return read


def raw(x: Float[Tensor, "row d_in"]) -> Units:
    """The arm that reads the stream's own dimensions."""
    return x.float().cpu().numpy()


def default_arms(
    dictionaries: Mapping[str, SparseAutoencoder],
    l0: Mapping[str, float],
    generator: torch.Generator,
) -> dict[str, Arm]:
    """Each dictionary beside an untrained random one of its size, and the raw stream.

    Args:
        dictionaries: By name.
        l0: Mean number of latents that fire, by the same names: the random one fires as many.
        generator: Draws the random directions.
    """
    arms: dict[str, Arm] = {name: codes_of(of_one) for name, of_one in dictionaries.items()}
    for name, of_one in dictionaries.items():
        arms[f"{name}, random"] = codes_of(random_dictionary(of_one, l0[name], generator))
    return {**arms, "raw neurons": raw}


def mean_difference(units: Units, y: Bool[np.ndarray, " row"]) -> Float64[np.ndarray, " unit"]:
    """Mean of each unit over the positive rows less that over the negative rows."""
    weight = np.where(y, 1 / y.sum(), -1 / (~y).sum())
    return np.asarray(units.T @ weight, dtype=np.float64).ravel()


def columns(units: Units, chosen: Int[np.ndarray, " k"]) -> Float[np.ndarray, "row k"]:
    """Some units as a dense matrix."""
    part = units[:, chosen]
    return part.toarray() if isinstance(part, scipy.sparse.csr_matrix) else np.asarray(part)


class RowLabels(NamedTuple):
    """A label for each row of a cache, or none."""

    names: tuple[str, ...]
    """What the labels are called."""
    label: Int[Tensor, "example pos"]
    """Index into the names; -1 where there is none."""

    def of(self, cache: ActivationCache, rows: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """The labels of rows."""
        refs = cache.refs(rows)
        return self.label[refs.example, refs.position]


def labels_of(cache: ActivationCache) -> RowLabels:
    """The labels that a cache was built with."""
    label = cache.examples.label
    none = torch.full(cache.examples.tokens.shape, -1)
    return RowLabels(cache.label_names, none if label is None else label.long())


def read_labels(path: str | Path, cache: ActivationCache) -> RowLabels:
    """Labels of a file: JSON lines with the `example` of a cache by its number, and its `label`.

    With a `position` as well a label is of that token or patch alone, and stands above one of the
    whole example.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line has another form, or names an example that the cache has not.
    """
    label, names = torch.full(cache.examples.tokens.shape, -1), {}
    parts: tuple[list, list] = ([], [])  # whole examples first
    for number, line in _lines(path):
        try:
            record = json.loads(line)
            place = (int(record["example"]), record.get("position"), str(record["label"]))
            parts[place[1] is not None].append((number, place))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            rule = 'must be such as {"example": 3, "label": "news"}'
            raise MonosemaError(f"{path}:{number} {rule}, got {line[:80]!r}") from None
    for number, (example, position, name) in (*parts[0], *parts[1]):
        n_positions = label.shape[1]
        is_there = 0 <= example < len(label) and (
            position is None or (isinstance(position, int) and 0 <= position < n_positions)
        )
        if not is_there:
            raise MonosemaError(
                f"{path}:{number} must name an example below {len(label):,} and a position below "
                f"{n_positions}, as {cache.path} has them, got {example} and {position}"
            )
        where = slice(None) if position is None else position
        label[example, where] = names.setdefault(name, len(names))
    return RowLabels(tuple(names), label)


def _lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise MonosemaError(f"{path} must be JSON lines in UTF-8, got {error.reason}") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


class AnsweredTexts(NamedTuple):
    """Texts with an answer each, and which concepts they have."""

    texts: list[str]
    answers: list[str]
    concepts: Bool[np.ndarray, "text concept"]
    names: list[str]
    """Of the concepts."""
    n_repeated: int
    """Records whose text had come before; they are left out."""


def read_answered(path: str | Path, fields: tuple[str, str, str]) -> AnsweredTexts:
    """Read JSON lines whose fields are a text, its answer, and its concepts.

    Concepts are a list of those that a text has, or an object with true and false by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a record has another form, or there is no concept or but one answer.
    """
    known: dict[str, tuple[str, set[str]]] = {}
    names: set[str] = set()
    lines = _lines(path)
    for number, line in lines:
        record = _answered(line, fields)
        if record is None:
            rule = f"must be a record with {fields[0]}, {fields[1]} and {fields[2]}"
            raise MonosemaError(f"{path}:{number} {rule}, got {line[:80]!r}")
        text, answer, of_text = record
        names |= of_text.keys()
        known.setdefault(text, (answer, {name for name, value in of_text.items() if value}))
    answers = [answer for answer, _ in known.values()]
    if not names or len(set(answers)) < 2:
        raise MonosemaError(
            f"{path} must have concepts and at least 2 answers, got {len(names)} concepts and "
            f"{len(set(answers))} answers in {len(known)} texts"
        )
    ordered = sorted(names)
    has = np.array([[name in of_text for name in ordered] for _, of_text in known.values()])
    return AnsweredTexts(list(known), answers, has, ordered, len(lines) - len(known))


def _answered(line: str, fields: tuple[str, str, str]) -> tuple[str, str, dict[str, bool]] | None:
    """Text, answer and concepts of a record; None where it has another form."""
    try:
        record = json.loads(line)
        text, answer, given = (record[name] for name in fields)
        pairs = given.items() if isinstance(given, dict) else ((name, True) for name in given)
        concepts = {str(name): bool(value) for name, value in pairs}
        return (text, str(answer), concepts) if text.strip() else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


LEAST = 20
"""Positive rows on either side below which a label is left out of a survey."""


def task_of(
    cache: ActivationCache,
    hook_point: str,
    label: str,
    *,
    n_train: int = 4000,
    n_test: int = 1000,
    seed: int = 0,
    labels: RowLabels | None = None,
) -> Task:
    """Rows of a label and as many of other labels: fitted on `explain`, scored on the other splits.

    Splits are made of documents, so no document is on both sides.

    Args:
        cache: A cache whose text or images have labels.
        hook_point: Which rows.
        label: One of the labels' names; rows without any label are left out.
        n_train: At most so many rows to fit on, half of them positive.
        n_test: At most so many to score on.
        seed: Decides which rows.
        labels: Other labels than the cache's own.

    Raises:
        ValueError: If the cache has no labels, not this one, not this hook point, or rows of one
            class alone.
    """
    check_hook_point(cache, hook_point)
    labels = labels or labels_of(cache)
    names = labels.names
    if label not in names:
        known = ", ".join(names) if names else "none; build a cache from labelled data"
        raise MonosemaError(f"label must be one of those of {cache.path}, got {label!r} of {known}")
    number = names.index(label)
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for splits, n, what in (
        (("explain",), n_train, f"{label!r} in the split explain"),
        (("score", "hold"), n_test, f"{label!r} in the splits score and hold"),
    ):
        rows = cache.rows(splits)
        result = labels.of(cache, rows)
        check_two_classes((result[result >= 0] == number).numpy(), what)
        sides.append(_balanced(rows, result, number, n // 2, generator))
    (train, train_y), (test, test_y) = sides
    source = cache[hook_point]
    refs = cache.refs(test)
    types = cache.refs(train).token.numpy(), refs.token.numpy()
    return Task(source[train], train_y, source[test], test_y, refs.example.numpy(), types)


def common_labels(
    cache: ActivationCache, least: int = LEAST, labels: RowLabels | None = None
) -> tuple[str, ...]:
    """Labels, the cache's or others, with `least` rows or more on both sides, most frequent first.

    Raises:
        ValueError: If the cache has none.
    """
    labels = labels or labels_of(cache)
    n_labels = len(labels.names)
    counts = []
    for splits in (("explain",), ("score", "hold")):
        result = labels.of(cache, cache.rows(splits))
        counts.append(torch.bincount(result[result >= 0], minlength=n_labels))
    least_of = torch.minimum(*counts) if n_labels else torch.zeros(0, dtype=torch.int64)
    order = least_of.argsort(descending=True, stable=True).tolist()
    names = tuple(labels.names[i] for i in order if int(least_of[i]) >= least)
    if len(names) < 2:
        raise MonosemaError(
            f"{cache.path} must have two labels with {least} rows in explain and in score and hold,"
            f" got {len(names)}; build a cache from labelled data"
        )
    return names


def check_hook_point(cache: ActivationCache, hook_point: str) -> None:
    """Refuse a cache that was made at another place.

    Raises:
        ValueError: If it does not hold the hook point.
    """
    if hook_point not in cache.hook_points:
        raise MonosemaError(
            f"{cache.path} must hold the hook point {hook_point}, got "
            f"{', '.join(cache.hook_points)}; build that cache or pass its path"
        )


def _balanced(
    rows: Int[Tensor, " row"],
    result: Int[Tensor, " row"],
    number: int,
    n: int,
    generator: torch.Generator,
) -> tuple[Tensor, np.ndarray]:
    """At most n rows of the label and as many of others, in random order."""
    of_class, others = rows[result == number], rows[(result >= 0) & (result != number)]
    n = min(n, len(of_class), len(others))
    picked = [
        part[torch.randperm(len(part), generator=generator)[:n]] for part in (of_class, others)
    ]
    order = torch.randperm(2 * n, generator=generator)
    return torch.cat(picked)[order], (order < n).numpy()


class Signature(NamedTuple):
    """How concepts lie along the principal directions of a set of rows (arXiv 2310.13040)."""

    n_rows: int
    """Rows with a label."""
    n_concepts: int
    unique: int
    """Concepts that are the best one of a direction, with an average precision of .9 or more."""
    per_direction: float
    """Concepts with such a precision, mean over the directions that have one; nan without."""
    accuracy: dict[float, Pruned]
    """Which label, told on the other half of the examples, by the share of directions taken out."""
    floor: float
    """Share of the most frequent label there."""


def signature_of(
    x: Float[Tensor, "row d_in"], concept: Int[Tensor, " row"], fitted: Bool[Tensor, " row"]
) -> Signature:
    """Unique concepts of all labelled rows, and pruning fitted on one half of the examples.

    Raises:
        ValueError: If that half has fewer than two labels, or the other none.
    """
    x, fitted, concept = (each[concept >= 0] for each in (x, fitted, concept))
    n_fitted, n_other = len(concept[fitted].unique()), int((~fitted).sum())
    if n_fitted < 2 or n_other == 0:
        raise MonosemaError(
            "labels must stand in both halves of the examples, 2 of them in the one that is fitted "
            f"on, got {n_fitted} there and {n_other} labelled rows in the other; label more of them"
        )
    names = concept.unique()
    concepts = encoded_concepts(x, concept[:, None] == names)
    accuracy = pruned(x[fitted], concept[fitted], x[~fitted], concept[~fitted])
    floor = float(concept[~fitted].bincount().max()) / int((~fitted).sum())
    figures = concepts.unique(), concepts.per_direction()
    return Signature(len(x), len(names), *figures, accuracy, floor)
