"""The documents of a source in the order in which they are packed, in little memory.

Every document goes to one split by a hash of its text, so copies of a text never meet across
splits, whichever file they are in. The documents of one split are put in the order of another
hash. So every document is looked at once, before the first one is packed. Its text is written to a
temporary file meanwhile (of a small source: to memory) and read from there when it is needed; in
memory stay 26 bytes of each document.

A stream whose length nobody knows may have no end. It is read only as far as its documents give
the rows that are wanted, and further where they prove too few; their order is again by the hash.
"""

import hashlib
import tempfile
from array import array
from collections.abc import Iterator
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


class Corpus:
    """The documents of one source.

    Args:
        source: Where they are.
        name: What their ids begin with.
        config: Its seed and fractions deal the documents to the splits.
        n_characters: Wanted of explain and score together, where the stream is endless.
        progress: Called with the number of documents that were looked at.
        texts: Where their text is written to.

    Raises:
        DiskFullError: If the temporary file of the text does not fit.
    """

    def __init__(
        self, source: TextSource, name: str, config: TextConfig, n_characters: int,
        progress: Progress, texts: IO[bytes],
    ) -> None:  # fmt: skip
        self._source, self.name, self._config, self._progress = source, name, config, progress
        self._texts = texts
        self.is_open_ended = is_open_ended(source)
        """Whether more can be read than was."""
        self._look(n_characters if self.is_open_ended else None)

    def _look(self, n_characters: int | None) -> None:
        split, order, start = array("b"), array("Q"), array("q")
        number, label, kind = array("I"), array("i"), array("b")
        known: dict[str | None, int] = {None: -1}
        end = n_training = 0
        self._ended = True
        self._texts.seek(0)
        seed = self._config.seed
        self.skipped = Skipped(self._source)
        """Records without a text."""
        for place, document in enumerate(documents(self._source, self.name, self.skipped)):
            if n_characters is not None and n_training >= n_characters:
                self._ended = False
                break
            split.append(split_of(document, self._config))
            order.append(int.from_bytes(hashed(seed, "order", document.text)))
            start.append(end)
            end += self._write(document)
            number.append(int(document.id.rpartition(":")[2]))
            label.append(known.setdefault(document.label, len(known) - 1))
            kind.append(KINDS.index(document.kind))
            n_training += len(document.text) * (split[-1] < SPLITS.index("hold"))
            if place % _REPORT_EVERY == 0:
                self._progress(place + 1, 0, "documents looked at")
        start.append(end)
        self._order, self._split = np.array(order, np.uint64), np.array(split, np.int8)
        self._start, self._kind = np.array(start, np.int64), np.array(kind, np.int8)
        self._numbers, self._labels = np.array(number, np.uint32), np.array(label, np.int32)
        self.label_names = tuple(name for name in known if name is not None)

    def _write(self, document: Document) -> int:
        try:
            return self._texts.write(document.text.encode())
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
        places = np.flatnonzero(self._split == split)
        places = places[np.argsort(self._order[places], kind="stable")]
        return Documents(self, places)

    def __getitem__(self, place: int) -> Document:
        """Return a document by its place in the source."""
        begin, end = self._start[place : place + 2].tolist()
        self._texts.seek(begin)
        text = self._texts.read(end - begin).decode()
        return Document(self.id(place), text, self.label(place), KINDS[self._kind[place]])

    def id(self, place: int) -> str:
        """Return the name of a document."""
        return f"{self.name}:{self._numbers[place]}"

    def label(self, place: int) -> str | None:
        """Return the label of a document."""
        number = int(self._labels[place])
        return None if number < 0 else self.label_names[number]


@dataclass(frozen=True)
class Documents:
    """The documents of one source and split, in their order."""

    corpus: Corpus
    places: Int64[np.ndarray, " document"]
    """Where each stands in the source."""

    def __iter__(self) -> Iterator[Document]:
        """Read one after the other."""
        return (self.corpus[place] for place in self.places.tolist())


class Bucket(NamedTuple):
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


def buckets_of(config: TextConfig, corpora: list[Corpus]) -> list[Bucket]:
    """Return the documents of each source and split; the split varies fastest."""
    return [
        Bucket(index, split, corpus.of(split), source.special_tokens)
        for index, (source, corpus) in enumerate(zip(config.sources, corpora, strict=True))
        for split in range(len(SPLITS))
    ]


def names_and_labels(
    used: Int64[np.ndarray, " document"], corpora: list[Corpus], buckets: list[Bucket]
) -> tuple[tuple[str, ...], list[str | None]]:
    """Return the names and the labels of documents that are numbered over all buckets."""
    sizes = [len(bucket.documents.places) for bucket in buckets]
    ends = np.cumsum(sizes)
    bucket_of = np.searchsorted(ends, used, "right").tolist()
    inside = (used - (ends - sizes)[bucket_of]).tolist()
    found = [
        (corpora[buckets[b].source], int(buckets[b].documents.places[i]))
        for b, i in zip(bucket_of, inside, strict=True)
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
