"""Documents from plain text, JSON lines, Parquet, Arrow (also compressed by gzip) or datasets.

Records of a dataset of the `datasets` library: from the hub as a stream, or from a directory.

A record without a text is skipped and counted. A list of ids in its place is read as it is.

A stream that breaks is opened again where it stopped, so faults of the network change no record.
"""

import gzip
import io
import json
import logging
import math
import re
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, get_args

import pyarrow as pa
from pyarrow import ArrowInvalid, parquet

from activations_cache.checks import DATASET, locate
from activations_cache.config import ImageSource, TextSource, text_format
from activations_cache.loading import one_line
from monosema.checks import MonosemaError, require

ATTEMPTS = 5
"""How often a stream is opened without a new record before it is given up."""
PAUSE_S = 1.0
"""Before the second attempt; doubled after each."""


_PARQUET_ROWS = 1024  # in memory at once

Source = TextSource | ImageSource

_log = logging.getLogger(__name__)


def dataset_rows(source: Source) -> Iterator[Mapping[str, Any]]:
    """Yield the records of a dataset in their order.

    Raises:
        FileNotFoundError: If there is no such dataset.
        ValueError: If it cannot be opened or lacks the split, or the stream breaks for good.
    """
    n_done, failures, records, place = 0, 0, None, None
    while True:
        try:
            records = _open(source, streaming=True) if records is None else records
            for record in _after(records, n_done, place):
                yield record
                n_done, failures, place = n_done + 1, 0, _place_in(records, source)
        except (*_of_network(), _NotFoundError) as error:
            if isinstance(error, _NotFoundError) and n_done == 0:
                raise
            failures += 1
            _wait(source, n_done, failures, error)
        else:
            return


def _place_in(records: Any, source: Source) -> dict[str, Any] | None:
    """Where a stream is, by file; None where it cannot go on from there and must skip.

    A shuffled stream cannot: what waits in its buffer would be lost.
    """
    is_shuffled = getattr(source, "shuffle_buffer", None) is not None
    return None if is_shuffled or not hasattr(records, "state_dict") else records.state_dict()


def _after(records: Any, n_done: int, place: dict[str, Any] | None) -> Any:
    """The records that were not read yet; files that were read are not asked for again."""
    if place is None:
        return records.skip(n_done) if n_done else records
    records.load_state_dict(place)
    return records


def dataset_table(source: Source) -> Any:
    """Return a dataset whose records can be read in any order; from the hub it is fetched whole.

    Raises:
        FileNotFoundError: If there is no such dataset.
        ValueError: If it cannot be fetched or lacks the split.
    """
    failures = 0
    while True:
        try:
            return _open(source, streaming=False)
        except FileNotFoundError:
            raise
        except _of_network() as error:
            failures += 1
            _wait(source, 0, failures, error)


class _NotFoundError(MonosemaError):
    """There is no such dataset, or its hub says so."""


def _of_network() -> tuple[type[Exception], ...]:
    """What a network may raise: the errors of the hub's HTTP library, and those of the system."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, EOFError)


def _wait(source: Source, n_done: int, failures: int, error: Exception) -> None:
    """Pause before the next attempt, or give up."""
    if failures >= ATTEMPTS:
        raise MonosemaError(
            f"{source.path} must be readable, got {one_line(error)} at record {n_done}, "
            f"{ATTEMPTS} times; check the name and the network, then run the same command again"
        ) from error
    pause = PAUSE_S * 2 ** (failures - 1)
    _log.warning("%s broke at record %d, again in %.0f s", source.path, n_done, pause)
    time.sleep(pause)


def _open(source: Source, *, streaming: bool) -> Any:
    """Return the records."""
    import datasets  # takes seconds
    from datasets import config
    from datasets.exceptions import DatasetNotFoundError

    # The library's own 20 attempts, 5 s apart, would come on top of ours.
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = PAUSE_S
    name = source.path.removeprefix(DATASET)
    try:
        if _is_saved(Path(name)):
            result = datasets.load_from_disk(name)
            records = result[source.part] if isinstance(result, dict) else result
        else:
            is_stream = streaming and not Path(name).is_dir()
            records: Any = datasets.load_dataset(
                name, source.subset, split=source.part, streaming=is_stream
            )
            n = source.shuffle_buffer if isinstance(source, TextSource) else None
            if n is not None:
                rule = "be absent for a directory, which has an order of its own"
                require(is_stream, "shuffle_buffer", rule, n)
                # The same order for every start; the files of a stream are shuffled as well.
                records = records.shuffle(seed=0, buffer_size=n)
    except DatasetNotFoundError as error:
        raise _NotFoundError(f"{source.path} must be a dataset, got {one_line(error)}") from error
    except KeyError as error:
        raise MonosemaError(
            f"{source.path} must have the part {source.part!r}, got none"
        ) from error
    except ValueError as error:  # an unknown part or subset; the library lists those there are
        raise MonosemaError(
            f"{source.path} must have part {source.part!r} of subset {source.subset!r}, "
            f"got {one_line(error)}"
        ) from error
    return records


def _is_saved(path: Path) -> bool:
    """Say whether `save_to_disk` wrote this directory."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


Kind = Literal["text", "chat", "ids"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Document:
    """One text that belongs together; it lies in one split as a whole."""

    id: str
    """Name of the source, colon, number of the record in the file."""
    text: str
    """The text, without white space at its ends."""
    label: str | None
    """The label of the record, if the source names a field for it."""
    kind: Kind = "text"
    """What the text stands for: itself, messages in JSON, or ids in decimal."""


def documents(
    source: TextSource, name: str | None = None, skipped: "Skipped | None" = None
) -> Iterator[Document]:
    """Read the documents of a source in the order of the file; empty ones are left out.

    Args:
        source: The file.
        name: What their ids begin with; the file name without suffixes if it is absent.
        skipped: Counts the records without a text.

    Raises:
        FileNotFoundError: If there is no such file or package.
        ValueError: If the file cannot be read, a record lacks a field, or no document is found.
    """
    name, result, skipped = name or source_name(source.path), False, skipped or Skipped(source)
    try:
        records = islice(_records(source, skipped), source.n_documents)
        for number, record in enumerate(records):
            if record is not None and (text := record.text.strip()):
                result = True
                yield Document(f"{name}:{number}", text, record.label, record.kind)
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError, ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise MonosemaError(
            f"{source.path} must be a whole {_kind(source)} file in UTF-8, got {reason}"
        ) from error
    skipped.log()
    if not result:
        raise MonosemaError(f"{source.path} must hold text, got no document that is not empty")


class _Record(NamedTuple):
    """What a record gives."""

    text: str
    label: str | None = None
    kind: Kind = "text"


class Skipped:
    """Counts the records without a text."""

    def __init__(self, source: TextSource) -> None:
        """Count from 0."""
        self._source, self.n, self.first = source, 0, 0

    def add(self, number: int) -> None:
        """Count the record with this number, from 1 on."""
        self.first = self.first or number
        self.n += 1

    def log(self) -> None:
        """Say how many there are."""
        if self.n:
            what = "1 record has" if self.n == 1 else f"{self.n:,} records have"
            _log.warning(
                "%s: %s nothing in field %r and gives no document, the first is record %d",
                self._source.path, what, self._source.field, self.first,
            )  # fmt: skip


def source_name(path: str) -> str:
    """Return the name of a file or a dataset without folders and suffixes."""
    return PurePosixPath(path.removesuffix(".gz")).stem


def is_open_ended(source: TextSource) -> bool:
    """Say whether a source is a stream from the hub whose length nobody knows."""
    is_stream = source.path.startswith(DATASET) and source.n_documents is None
    return is_stream and not Path(source.path.removeprefix(DATASET)).is_dir()


def _kind(source: TextSource) -> str:
    return "dataset" if source.path.startswith(DATASET) else text_format(source.path)


def _records(source: TextSource, skipped: Skipped) -> Iterator[_Record | None]:
    kind = _kind(source)
    if kind == "dataset":
        yield from _of_rows(dataset_rows(source), source, skipped)
        return
    path = locate(source.path)
    with gzip.open(path) if source.path.endswith(".gz") else path.open("rb") as file:
        if kind in (".parquet", ".arrow"):
            rows = _parquet_rows if kind == ".parquet" else _arrow_rows
            yield from _of_rows(rows(file, source), source, skipped)
            return
        lines = io.TextIOWrapper(file, encoding="utf-8")
        if kind == ".txt":
            yield from (_Record(text) for text in _parts(lines, source.document_pattern))
        else:
            yield from _of_rows(_json_rows(lines, source), source, skipped)


def _of_rows(
    rows: Iterable[Mapping[str, object]], source: TextSource, skipped: Skipped
) -> Iterator[_Record | None]:
    for number, row in enumerate(rows, start=1):
        if number == 1:  # later records may lack a field, but a wrong name shows here
            _require_field(row, source.field, f" record {number}", source)
        entry = row.get(source.field)
        if _is_nothing(entry):
            skipped.add(number)
            yield None
        else:
            yield _record(entry, _label(row, number, source), number, source)


def _is_nothing(entry: object) -> bool:
    """Say whether a field is empty; NaN is what pandas writes for that."""
    is_nan = isinstance(entry, float) and math.isnan(entry)
    return entry is None or is_nan or (isinstance(entry, list | tuple) and not entry)


def _parts(lines: Iterable[str], document_pattern: str | None) -> Iterator[str]:
    """Cut plain text before each line that begins with the pattern."""
    begins = re.compile(document_pattern).match if document_pattern is not None else None
    part: list[str] = []
    for line in lines:
        if begins is not None and begins(line):
            yield "".join(part)
            part = []
        part.append(line)
    yield "".join(part)


def _json_rows(lines: Iterable[str], source: TextSource) -> Iterator[Mapping[str, object]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise MonosemaError(
                f"{source.path} line {number} must be JSON, got {line.strip()[:40]!r}"
            ) from error
        if not isinstance(row, dict):
            raise MonosemaError(
                f"{source.path} line {number} must be a JSON object, got {row!r:.40}"
            )
        yield row


def _parquet_rows(file: io.BufferedIOBase, source: TextSource) -> Iterator[Mapping[str, object]]:
    table = parquet.ParquetFile(file)
    wanted = [name for name in (source.field, source.label) if name is not None]
    for name in wanted:
        _require_field(table.schema_arrow.names, name, "", source)
    for batch in table.iter_batches(_PARQUET_ROWS, columns=wanted):
        yield from batch.to_pylist()


def _arrow_rows(file: io.BufferedIOBase, source: TextSource) -> Iterator[Mapping[str, object]]:
    """Read Arrow's IPC as a file or as a stream, which is what `datasets` writes."""
    begin = file.read(6)
    file.seek(0)
    wanted = [name for name in (source.field, source.label) if name is not None]
    is_file = begin == b"ARROW1"
    with pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file) as reader:
        for name in wanted:
            _require_field(reader.schema.names, name, "", source)
        n = reader.num_record_batches if is_file else None
        batches = iter(reader) if n is None else (reader.get_batch(i) for i in range(n))
        for batch in batches:
            yield from batch.select(wanted).to_pylist()


def _record(entry: object, label: str | None, number: int, source: TextSource) -> _Record:
    if source.chat:
        return _Record(_messages(entry, number, source), label, "chat")
    if isinstance(entry, str):
        # JSON can hold lone surrogates, UTF-8 cannot.
        return _Record(entry.encode(errors="replace").decode(), label)
    ids = getattr(entry, "tolist", lambda: entry)()  # a tensor, where a dataset has a format
    if isinstance(ids, list) and all(type(i) is int for i in ids):
        return _Record(" ".join(map(str, ids)), label, "ids")
    raise MonosemaError(
        f"{source.path} record {number} must have text in field {source.field!r}, got {entry!r:.60}"
    )


def _messages(entry: object, number: int, source: TextSource) -> str:
    """Return messages as JSON; the tokenizer's template turns them into text where they are cut."""
    is_chat = isinstance(entry, list) and all(
        isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in entry
    )
    if not is_chat:
        raise MonosemaError(
            f"{source.path} record {number} must have messages with role and content in field "
            f"{source.field!r}, got {entry!r:.60}"
        )
    return json.dumps(entry, default=str)


def _label(row: Mapping[str, object], number: int, source: TextSource) -> str | None:
    if source.label is None:
        return None
    label = _entry(row, source.label, number, source)
    return None if label is None else str(label)


def _entry(row: Mapping[str, object], name: str, number: int, source: TextSource) -> object:
    _require_field(row, name, f" record {number}", source)
    return row[name]


def _require_field(names: Collection[str], name: str, where: str, source: TextSource) -> None:
    if name not in names:
        raise MonosemaError(
            f"{source.path}{where} must have the field {name!r}, got {', '.join(names)}"
        )
