"""The documents of a source in the order in which they are packed, in little memory.

Every document goes to one split by a hash of its text, so copies of a text never meet across
splits, whichever file they are in. The documents of one split are put in the order of another
hash. So every document is looked at once, before the first one is packed. Its text is written to a
temporary file meanwhile (of a small source: to memory) and read from there when it is needed. What
is known of each document lies in such files too, so that memory does not grow with their number.

A stream whose length nobody knows may have no end. It is read only as far as its documents give
the rows that are wanted, and further where they prove too few; their order is again by the hash.
"""

import hashlib
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple

import numpy as np
from jaxtyping import Int64

from activations_cache.checks import DiskFullError, Progress
from activations_cache.config import SPLITS, TextConfig, TextSource
from activations_cache.documents import (
    KINDS,
    Document,
    Skipped,
    documents,
    is_open_ended,
    source_name,
)

MEMORY_BYTES = 1 << 24
"""The text of a source with fewer bytes stays in memory."""
CHARACTERS_PER_TOKEN = 8
"""A guess, on the safe side for most languages: how much of an endless stream is read first."""

_REPORT_EVERY = 256
_CHUNK = 1 << 17  # records in memory at once
_SORTED = 1 << 19  # of a split, while they are put in order
_RECORD = struct.Struct("<QqqIibb")
_FIELDS = np.dtype([
    ("order", "<u8"), ("start", "<i8"), ("length", "<i8"), ("number", "<u4"), ("label", "<i4"),
    ("split", "i1"), ("kind", "i1"),
])  # fmt: skip


class _Table:
    """Records of one size in a file."""

    def __init__(self, file: IO[bytes], dtype: np.dtype) -> None:
        self._file, self._dtype, self._n = file, dtype, 0

    def __len__(self) -> int:
        return self._n

    def clear(self) -> None:
        self._file.seek(0)
        self._n = 0

    def append(self, records: bytes) -> None:
        self._file.write(records)
        self._n += len(records) // self._dtype.itemsize

    def read(self, begin: int, end: int) -> np.ndarray:
        self._file.seek(begin * self._dtype.itemsize)
        return np.frombuffer(self._file.read((end - begin) * self._dtype.itemsize), self._dtype)

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of the first record of each chunk, and the chunk."""
        for begin in range(0, self._n, _CHUNK):
            yield begin, self.read(begin, min(begin + _CHUNK, self._n))


class Corpus:
    """The documents of one source.

    Args:
        source: Where they are.
        name: What their ids begin with.
        config: Its seed and fractions deal the documents to the splits.
        n_characters: Wanted of explain and score together, where the stream is endless.
        progress: Called with the number of documents that were looked at.
        spool: Opens a temporary file for their text, and for what is known of them.

    Raises:
        DiskFullError: If the temporary file of the text does not fit.
    """

    def __init__(
        self, source: TextSource, name: str, config: TextConfig, n_characters: int,
        progress: Progress, spool: Callable[[], IO[bytes]],
    ) -> None:  # fmt: skip
        self._source, self.name, self._config, self._progress = source, name, config, progress
        self._texts, self._spool, self._table = spool(), spool, _Table(spool(), _FIELDS)
        self.is_open_ended = is_open_ended(source)
        """Whether more can be read than was."""
        self._look(n_characters if self.is_open_ended else None)

    def _look(self, n_characters: int | None) -> None:
        known: dict[str | None, int] = {None: -1}
        start = n_training = 0
        self._ended = True
        self._texts.seek(0)
        self._table.clear()
        seed, n_hold = self._config.seed, SPLITS.index("hold")
        self.skipped = Skipped(self._source)
        """Records without a text."""
        for place, document in enumerate(documents(self._source, self.name, self.skipped)):
            if n_characters is not None and n_training >= n_characters:
                self._ended = False
                break
            split, text = split_of(document, self._config), document.text.encode()
            order = int.from_bytes(hashed(seed, "order", document.text))
            number = int(document.id.rpartition(":")[2])
            label = known.setdefault(document.label, len(known) - 1)
            kind = KINDS.index(document.kind)
            self._write(text, _RECORD.pack(order, start, len(text), number, label, split, kind))
            start += len(text)
            n_training += len(document.text) * (split < n_hold)
            if place % _REPORT_EVERY == 0:
                self._progress(place + 1, 0, "documents looked at")
        self.label_names = tuple(name for name in known if name is not None)

    def _write(self, text: bytes, record: bytes) -> None:
        try:
            self._texts.write(text)
            self._table.append(record)
        except OSError as error:
            where = tempfile.gettempdir()
            raise DiskFullError(
                f"{where} must have room for the text of {self._source.path}, got "
                f"{error.strerror}; set TMPDIR to a directory with more room"
            ) from error

    def read_further(self, n_characters: int) -> bool:
        """Look at more of an endless stream; False where there is no more."""
        if self._ended:
            return False
        self._look(n_characters)
        return True

    def of(self, split: int) -> "Documents":
        """Return the documents of one split in their order."""
        # One range of the hashes after the other, so that few of them are sorted at once.
        places, n_ranges = (
            _Table(self._spool(), np.dtype(np.int64)),
            len(self._table) // _SORTED + 1,
        )
        for number in range(n_ranges):
            orders, here = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
            for begin, chunk in self._table.chunks():
                ranges = (chunk["order"] >> np.uint64(32)) * np.uint64(n_ranges) >> np.uint64(32)
                chosen = np.flatnonzero((chunk["split"] == split) & (ranges == number))
                orders.append(chunk["order"][chosen])
                here.append(begin + chosen)
            order = np.argsort(np.concatenate(orders), kind="stable")
            places.append(np.concatenate(here)[order].tobytes())
        return Documents(self, places)

    def __getitem__(self, place: int) -> Document:
        """Return a document by its place in the source."""
        record = self._record(place)
        self._texts.seek(record["start"])
        text = self._texts.read(int(record["length"])).decode()
        return Document(self.id(place), text, self.label(place), KINDS[record["kind"]])

    def _record(self, place: int) -> np.void:
        return self._table.read(place, place + 1)[0]

    def id(self, place: int) -> str:
        """Return the name of a document."""
        return f"{self.name}:{self._record(place)['number']}"

    def label(self, place: int) -> str | None:
        """Return the label of a document."""
        number = int(self._record(place)["label"])
        return None if number < 0 else self.label_names[number]


@dataclass(frozen=True)
class Documents:
    """The documents of one source and split, in their order."""

    corpus: Corpus
    _places: _Table

    def __len__(self) -> int:
        """Count them."""
        return len(self._places)

    def __iter__(self) -> Iterator[Document]:
        """Read one after the other."""
        for _, places in self._places.chunks():
            for place in places.tolist():
                yield self.corpus[place]

    def place(self, number: int) -> int:
        """Return where one of them stands in the source."""
        return int(self._places.read(number, number + 1)[0])


class Portion(NamedTuple):
    """The documents of one source and one split, in their order."""

    source: int
    split: int
    documents: Documents
    speak: bool = False
    """Whether special tokens that a text names are read as such."""


def source_names(config: TextConfig) -> tuple[str, ...]:
    """Return the sources' file names, numbered where two are the same."""
    names = [source_name(source.path) for source in config.sources]
    repeats = [names[:i].count(name) for i, name in enumerate(names)]
    return tuple(f"{name}#{n + 1}" if n else name for name, n in zip(names, repeats, strict=True))


def portions_of(config: TextConfig, corpora: list[Corpus]) -> list[Portion]:
    """Return the documents of each source and split; the split varies fastest."""
    return [
        Portion(index, split, corpus.of(split), source.special_tokens)
        for index, (source, corpus) in enumerate(zip(config.sources, corpora, strict=True))
        for split in range(len(SPLITS))
    ]


def names_and_labels(
    used: Int64[np.ndarray, " document"], corpora: list[Corpus], portions: list[Portion]
) -> tuple[tuple[str, ...], list[str | None]]:
    """Return the names and the labels of documents that are numbered over all portions."""
    sizes = [len(portion.documents) for portion in portions]
    ends = np.cumsum(sizes)
    portion_of = np.searchsorted(ends, used, "right").tolist()
    inside = (used - (ends - sizes)[portion_of]).tolist()
    found = [
        (corpora[portions[b].source], portions[b].documents.place(i))
        for b, i in zip(portion_of, inside, strict=True)
    ]
    names = tuple(corpus.id(place) for corpus, place in found)
    return names, [corpus.label(place) for corpus, place in found]


def split_of(document: Document, config: TextConfig) -> int:
    """Return the split of a document as an index into SPLITS."""
    drawn = int.from_bytes(hashed(config.seed, "split", document.text)) / 2**64
    if drawn < config.explain:
        return 0
    return 1 if drawn < config.explain + config.score else 2


def hashed(*parts: object) -> bytes:
    """Return eight bytes that depend on all parts."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
