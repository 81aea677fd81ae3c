"""The files that explaining leaves: latents.parquet, examples.parquet and summary.json."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from activations_cache import seals
from monosema.checks import MonosemaError
from sae.explain.examples import Context

LATENTS = "latents.parquet"
EXAMPLES = "examples.parquet"
SUMMARY = "summary.json"
WEIGHTS = "weights.json"

EXPLAIN_AGAIN = "run `sae explain` again to make it anew"

WRITING = {"compression": "zstd", "write_page_checksum": True}
"""How Parquet is written: each page has a checksum for readers of other libraries too."""

_LATENTS_PER_ROW_GROUP = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentRecord:
    """Everything that is known of one latent; a row of latents.parquet.

    Figures of the score are None where the latent was not scored.
    """

    latent: int
    """Its number."""
    status: str
    """"scored"; "insufficient" where it fires too seldom for a score; "dead" where never; of images
    also "unlabelled" where no class is certain."""
    label: str
    """The label as text; empty where it fires too seldom in the explain split."""
    kind: str
    """What the label speaks of: word, previous word, token, supersense, source or position; of
    images class or group."""
    words: tuple[str, ...]
    """What the label lists, most informative first."""
    weights: tuple[float, ...]
    """Shrunken p(fires | word): the rule's scores."""
    joint: tuple[int, ...]
    """Rows of the explain split with the word on which the latent fires."""
    information: tuple[float, ...]
    """Mutual information of the latent and each word alone, in nats."""
    npmi: tuple[float, ...]
    """Normalised pointwise mutual information of the latent and each word."""
    gain: float | None = None
    """Information of the rule above that of permuted texts, in nats."""
    p_value: float | None
    """Of the rule, by permutation; the search over words and kinds is allowed for. Of images
    Fisher's."""
    auc: float | None
    """Score of the label on the score split; 0.5 is chance."""
    low: float | None
    """Lower end of its 95 % interval."""
    high: float | None
    """Upper end."""
    control_auc: float | None
    """AUC of another latent's label on this latent."""
    auc_wide: float | None = None
    """AUC of the larger rule, which is not what the label says."""
    n_fired_explain: int
    """Rows of the explain split on which it fires."""
    n_fired_score: int
    """The same for the score split."""
    density: float
    """Share of the rows of both splits on which it fires."""
    max_activation: float
    """Largest activation on them."""
    histogram: tuple[int, ...]
    """Counts of its activations in equal steps from 0 to max_activation, silent rows left out."""
    p_held_out: float | None
    """Share of permuted unseen texts on which the label scores as well; auc beats its null at 1 %
    where this is at most 0.01."""
    auc_strong: float | None = None
    """AUC of the strongest tenth of the firings against the silent rows; None where too few."""
    p_strong: float | None = None
    """The same share for it."""
    curve: tuple[float | None, ...]
    """Share of the firings in each fifth of its largest activation with one of the words."""
    curve_n: tuple[int, ...]
    """Firings in each fifth."""
    base: float | None
    """Share of all rows with one of the words."""


_TEXTS, _FLOATS = pa.list_(pa.string()), pa.list_(pa.float32())
_LATENT_SCHEMA = pa.schema({
    "latent": pa.int32(), "status": pa.string(), "label": pa.string(), "kind": pa.string(),
    "words": _TEXTS, "weights": _FLOATS, "joint": pa.list_(pa.int64()), "information": _FLOATS,
    "npmi": _FLOATS, "gain": pa.float64(), "p_value": pa.float64(), "auc": pa.float64(),
    "low": pa.float64(), "high": pa.float64(), "control_auc": pa.float64(),
    "auc_wide": pa.float64(), "n_fired_explain": pa.int64(), "n_fired_score": pa.int64(),
    "density": pa.float64(), "max_activation": pa.float32(), "histogram": pa.list_(pa.int64()),
    "p_held_out": pa.float64(), "auc_strong": pa.float64(), "p_strong": pa.float64(),
    "curve": pa.list_(pa.float64()), "curve_n": pa.list_(pa.int64()), "base": pa.float64(),
})  # fmt: skip
_CONTEXT_SCHEMA = pa.schema({
    "latent": pa.int32(), "rank": pa.int16(), "activation": pa.float32(), "example": pa.int64(),
    "split": pa.string(), "source": pa.string(), "start": pa.int32(), "peak": pa.int32(),
    "tokens": _TEXTS, "activations": _FLOATS,
})  # fmt: skip


def write_tables(
    directory: Path,
    latents: Iterable[LatentRecord],
    contexts: Iterable[Context],
    top_contexts: int,
    summary: Mapping[str, object],
) -> None:
    """Write the three files durably and listed; the summary is the last to appear.

    Args:
        directory: Where; made if it is missing.
        latents: One record per latent, ascending.
        contexts: Contexts of all latents, sorted by latent.
        top_contexts: Contexts per latent, which sets the size of a row group.
        summary: What summary.json is to say.
    """
    seals.remove(directory, (SUMMARY,))
    group = _LATENTS_PER_ROW_GROUP * top_contexts
    _write(directory / EXAMPLES, contexts, _CONTEXT_SCHEMA, group)
    _write(directory / LATENTS, latents, _LATENT_SCHEMA, 1 << 16)
    seals.write(directory, {SUMMARY: as_json(summary)})


def as_json(record: Mapping[str, object]) -> bytes:
    """Return a record as it stands in a file."""
    return (json.dumps(record, indent=2, allow_nan=False) + "\n").encode()


def read_summary(path: Path) -> dict:
    """Read a JSON object that explaining wrote.

    Raises:
        DamagedFileError: If it is not as it was written.
    """
    return json.loads(seals.read(path, advice=EXPLAIN_AGAIN))


def _write(
    path: Path, records: Iterable[LatentRecord | Context], schema: pa.Schema, group: int
) -> None:
    table = pa.Table.from_pylist([vars(record) for record in records], schema=schema)
    with seals.replacing(path) as unfinished:
        pq.write_table(table, unfinished, row_group_size=group, **WRITING)


def read_latents(path: str | Path) -> list[LatentRecord]:
    """Read latents.parquet, or that of a directory of explanations; record i is latent i.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its columns are not those of this version.
    """
    path = Path(path)
    file = path / LATENTS if path.is_dir() else path
    return [LatentRecord(**row) for row in _rows(file, _LATENT_SCHEMA)]


class LatentAbout(NamedTuple):
    """A latent whose label names one of some words."""

    latent: int
    """Its number."""
    label: str
    """Its label."""
    worth: float
    """Sum over the words that it names: of mutual information, or of weight PMI, in nats."""
    auc: float | None
    """How well its label tells unseen rows; 0.5 is chance."""


def latents_about(
    directory: Path, words: Sequence[str], n: int, *, by: Literal["information", "weights"]
) -> list[LatentAbout]:
    """The n latents whose labels tell most about some words; small and capital letters are one.

    Of labels from the corpus those count that speak of words or tokens, were scored, and beat their
    own null at 1 %; of labels from weights those that were scored.

    Args:
        directory: Of the labels.
        words: What they shall name.
        n: How many at most.
        by: Which labels.

    Raises:
        FileNotFoundError: If there are no such labels.
        ValueError: If no label names any of the words.
    """
    wanted = {word.strip().lower() for word in words}
    known = _by_information if by == "information" else _by_weights
    results = []
    for latent, label, values, auc in known(directory):
        worths = [worth for word, worth in values if word.strip().lower() in wanted]
        if worths:
            results.append(LatentAbout(latent, label, sum(worths), auc))
    if not results:
        raise MonosemaError(
            f"words must be named by a label of {directory} that was scored, got "
            f"{', '.join(sorted(wanted))}; try other words or other forms of them"
        )
    return sorted(results, key=lambda one: (-one.worth, one.latent))[:n]


_Valued = Iterator[tuple[int, str, Iterable[tuple[str, float]], float | None]]


def _by_information(directory: Path) -> _Valued:
    for one in read_latents(directory):
        is_sure = one.p_held_out is None or one.p_held_out <= 0.01
        if one.status == "scored" and one.kind in ("word", "token") and is_sure:
            pairs = zip(one.words, one.information, strict=True)
            yield one.latent, one.label, pairs, one.auc


def _by_weights(directory: Path) -> _Valued:
    if not (directory / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{directory / WEIGHTS} must exist, got no such file; run `sae explain` "
            "with weights=5000"
        )
    for one in read_summary(directory / WEIGHTS)["latents"]:
        if one["auc"] is not None:
            pairs = zip(one["words"], one["pmi"], strict=True)
            yield one["latent"], f"by weights: {', '.join(one['words'])}", pairs, one["auc"]


def read_examples(path: str | Path, latent: int | None = None) -> list[Context]:
    """Read the contexts of one latent, the largest peak first, or of all latents.

    Only the part of the file that holds the latent is read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its columns are not those of this version.
    """
    only = None if latent is None else [("latent", "==", latent)]
    return [Context(**row) for row in _rows(Path(path), _CONTEXT_SCHEMA, only)]


def iter_examples(path: Path) -> Iterator[tuple[int, list[Context]]]:
    """The contexts of one latent after the other, without holding the file in memory.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    file = pq.ParquetFile(whole_parquet(path), page_checksum_verification=True)
    batches = file.iter_batches(batch_size=4096)
    rows = (_tuples(row) for batch in batches for row in batch.to_pylist())
    for latent, group in itertools.groupby(rows, lambda row: row["latent"]):
        yield latent, [Context(**row) for row in group]


def _tuples(row: dict) -> dict:
    return {name: tuple(item) if isinstance(item, list) else item for name, item in row.items()}


def _rows(
    path: Path, schema: pa.Schema, only: list[tuple[str, str, int]] | None = None
) -> list[dict]:
    whole_parquet(path)
    if not pq.read_schema(path).equals(schema):
        names = pq.read_schema(path).names
        raise MonosemaError(
            f"columns of {path} must be {schema.names}, got {names}; run `sae explain` again"
        )
    rows = pq.read_table(path, filters=only, page_checksum_verification=True).to_pylist()
    return [_tuples(row) for row in rows]


def whole_parquet(path: Path) -> Path:
    """Return the path of a Parquet file that is as it was written.

    Raises:
        FileNotFoundError: If there is none.
        DamagedFileError: If it is another.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a file; run `sae explain` to make it")
    return seals.require_whole(path, advice=EXPLAIN_AGAIN)
