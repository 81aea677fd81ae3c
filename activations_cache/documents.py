"""Documents from plain text, JSON lines, Parquet (each also compressed by gzip) or datasets."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath

from pyarrow import ArrowInvalid, parquet

from activations_cache.config import TextSource, text_format
from activations_cache.datasets import dataset_rows
from activations_cache.locations import DATASET, locate


@dataclass(frozen=True)
class Document:
    """One text that belongs together; it lies in one split as a whole."""

    id: str
    """Name of the source, colon, number of the record in the file."""
    text: str
    """The text, without white space at its ends."""
    label: str | None
    """The label of the record, if the source names a field for it."""


def documents(source: TextSource, name: str | None = None) -> Iterator[Document]:
    """Read the documents of a source in the order of the file; empty ones are left out.

    Args:
        source: The file.
        name: What their ids begin with; the file name without suffixes if it is absent.

    Raises:
        FileNotFoundError: If there is no such file or package.
        ValueError: If the file cannot be read, a record lacks a field, or no document is found.
    """
    name, found = name or source_name(source.path), False
    try:
        records = islice(_records(source), source.n_documents)
        for number, (text, label) in enumerate(records):
            if text := text.strip():
                found = True
                yield Document(f"{name}:{number}", text, label)
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError, ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{source.path} must be a whole {_kind(source)} file in UTF-8, got {reason}"
        ) from error
    if not found:
        raise ValueError(f"{source.path} must hold text, got no document that is not empty")


def source_name(path: str) -> str:
    """Return the name of a file or a dataset without folders and suffixes."""
    return PurePosixPath(path.removesuffix(".gz")).stem


def _kind(source: TextSource) -> str:
    return "dataset" if source.path.startswith(DATASET) else text_format(source.path)


def _records(source: TextSource) -> Iterator[tuple[str, str | None]]:
    kind = _kind(source)
    if kind == "dataset":
        yield from _of_rows(dataset_rows(source), source)
        return
    path = locate(source.path)
    with gzip.open(path) if source.path.endswith(".gz") else path.open("rb") as file:
        if kind == ".parquet":
            yield from _of_rows(_parquet_rows(file, source), source)
            return
        lines = io.TextIOWrapper(file, encoding="utf-8")
        if kind == ".txt":
            yield from ((text, None) for text in _parts(lines, source.document_pattern))
        else:
            yield from _of_rows(_json_rows(lines, source), source)


def _of_rows(
    rows: Iterable[Mapping[str, object]], source: TextSource
) -> Iterator[tuple[str, str | None]]:
    for number, row in enumerate(rows, start=1):
        yield _text(row, number, source), _label(row, number, source)


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
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{source.path} line {number} must be JSON, got {line.strip()[:40]!r}"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{source.path} line {number} must be a JSON object, got {row!r:.40}")
        yield row


def _parquet_rows(file: io.BufferedIOBase, source: TextSource) -> Iterator[Mapping[str, object]]:
    table = parquet.ParquetFile(file)
    wanted = [name for name in (source.field, source.label) if name is not None]
    for name in wanted:
        _require_field(table.schema_arrow.names, name, "", source)
    for batch in table.iter_batches(columns=wanted):
        yield from batch.to_pylist()


def _text(row: Mapping[str, object], number: int, source: TextSource) -> str:
    text = _entry(row, source.field, number, source)
    if source.chat:
        return _messages(text, number, source)
    if not isinstance(text, str):
        raise ValueError(
            f"{source.path} record {number} must have text in field {source.field!r}, got {text!r}"
        )
    return text.encode(errors="replace").decode()  # JSON can hold lone surrogates, UTF-8 cannot


def _messages(entry: object, number: int, source: TextSource) -> str:
    """Return messages as JSON; the tokenizer's template turns them into text where they are cut."""
    is_chat = isinstance(entry, list) and all(
        isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in entry
    )
    if not is_chat or not entry:
        raise ValueError(
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
        raise ValueError(
            f"{source.path}{where} must have the field {name!r}, got {', '.join(names)}"
        )
