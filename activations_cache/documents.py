"""Documents from text files: plain text, JSON lines or Parquet, each also compressed by gzip."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pyarrow import ArrowInvalid, parquet

from activations_cache.config import TextSource, text_format
from activations_cache.locations import locate


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
    path, name = locate(source.path), name or source_name(source.path)
    found = False
    try:
        for number, (text, label) in enumerate(_records(path, source)):
            if text := text.strip():
                found = True
                yield Document(f"{name}:{number}", text, label)
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError, ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{source.path} must be a whole {text_format(source.path)} file in UTF-8, got {reason}"
        ) from error
    if not found:
        raise ValueError(f"{source.path} must hold text, got no document that is not empty")


def source_name(path: str) -> str:
    """Return the file name without folders and suffixes."""
    return PurePosixPath(path.removesuffix(".gz")).stem


def _records(path: Path, source: TextSource) -> Iterator[tuple[str, str | None]]:
    kind = text_format(source.path)
    with gzip.open(path) if source.path.endswith(".gz") else path.open("rb") as file:
        if kind == ".parquet":
            rows = _parquet_rows(file, source)
        else:
            lines = io.TextIOWrapper(file, encoding="utf-8")
            if kind == ".txt":
                yield from ((text, None) for text in _parts(lines, source.document_pattern))
                return
            rows = _json_rows(lines, source)
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
    if not isinstance(text, str):
        raise ValueError(
            f"{source.path} record {number} must have text in field {source.field!r}, got {text!r}"
        )
    return text.encode(errors="replace").decode()  # JSON can hold lone surrogates, UTF-8 cannot


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
