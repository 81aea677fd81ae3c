"""The documents of a source in the order in which they are packed, in constant memory.

Every document goes to one split by a hash of its text, so copies of a text never meet across
splits, whichever file they are in. The documents of one split are put in the order of another
hash. So every document is looked at once, and of each only its hash and its length are kept. The
texts are read again in bunches, as they are needed; those of a small source stay in memory.

A stream whose length nobody knows may have no end. It is read only as far as its documents give
the rows that are wanted, and further where they prove too few; their order is again by the hash.
"""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from activations_cache.checks import Progress
from activations_cache.config import SPLITS, TextConfig, TextSource
from activations_cache.documents import Document, documents, is_open_ended, source_name

KEPT_CHARACTERS = 1 << 24
"""A source with fewer characters stays in memory."""
BUNCH_CHARACTERS = 1 << 25
"""So many characters of a larger source are in memory at once, at most."""
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
    """

    def __init__(
        self, source: TextSource, name: str, config: TextConfig, n_characters: int,
        progress: Progress,
    ) -> None:  # fmt: skip
        self._source, self._name, self._config, self._progress = source, name, config, progress
        self.is_open_ended = is_open_ended(source)
        """Whether more can be read than was."""
        self._texts: dict[int, Document] = {}
        self._look(n_characters if self.is_open_ended else None)

    def _look(self, n_characters: int | None) -> None:
        split, order = array("b"), array("Q")
        length, number, label = array("q"), array("q"), array("q")
        known: dict[str | None, int] = {None: -1}
        total = n_training = 0
        self._ended = True
        seed = self._config.seed
        for place, document in enumerate(documents(self._source, self._name)):
            if n_characters is not None and n_training >= n_characters:
                self._ended = False
                break
            split.append(split_of(document, self._config))
            order.append(int.from_bytes(hashed(seed, "order", document.text)))
            length.append(len(document.text))
            number.append(int(document.id.rpartition(":")[2]))
            label.append(known.setdefault(document.label, len(known) - 1))
            total += len(document.text)
            n_training += len(document.text) * (split[-1] < SPLITS.index("hold"))
            if total <= KEPT_CHARACTERS:
                self._texts[place] = document
            if place % _REPORT_EVERY == 0:
                self._progress(place + 1, 0, "documents looked at")
        self._is_kept = total <= KEPT_CHARACTERS
        if not self._is_kept:
            self._texts.clear()
        self._order = np.array(order, np.uint64)
        self._split, self._length = np.array(split, np.int8), np.array(length, np.int64)
        self.numbers: Int64[np.ndarray, " document"] = np.array(number, np.int64)
        """The number of each document's record."""
        self.labels: Int64[np.ndarray, " document"] = np.array(label, np.int64)
        """Index into `label_names`; -1 for none."""
        self.label_names = tuple(name for name in known if name is not None)

    def read_further(self, n_characters: int) -> bool:
        """Look at more of an endless stream; False where there is no more."""
        if self._ended:
            return False
        self._texts.clear()
        self._look(n_characters)
        return True

    def of(self, split: int) -> "Documents":
        """Return the documents of one split in their order."""
        places = np.flatnonzero(self._split == split)
        places = places[np.argsort(self._order[places], kind="stable")]
        return Documents(self, places)

    def read(self, places: Int64[np.ndarray, " document"]) -> list[Document]:
        """Return documents by their place in the source: from memory, or in one pass over it."""
        if not self._is_kept:
            wanted = set(places.tolist())
            every = enumerate(islice(documents(self._source, self._name), int(places.max()) + 1))
            self._texts = {place: document for place, document in every if place in wanted}
        return [self._texts[place] for place in places.tolist()]

    def bunches(self, places: Int64[np.ndarray, " document"], n_characters: int) -> Iterator[slice]:
        """Cut documents into parts that fit into memory."""
        if self._is_kept:
            yield slice(0, len(places))
            return
        ends = np.cumsum(self._length[places])
        start = 0
        while start < len(places):
            before = ends[start - 1] if start else 0
            stop = int(np.searchsorted(ends, before + n_characters, "right"))
            stop = max(stop, start + 1)
            yield slice(start, stop)
            start = stop

    def id(self, place: int) -> str:
        """Return the name of a document."""
        return f"{self._name}:{self.numbers[place]}"


@dataclass(frozen=True)
class Documents:
    """The documents of one source and split, in their order."""

    corpus: Corpus
    places: Int64[np.ndarray, " document"]
    """Where each stands in the source."""
    n_characters: int = BUNCH_CHARACTERS
    """Read at once; the documents are few where few are needed."""

    def __iter__(self) -> Iterator[Document]:
        """Read one after the other."""
        for part in self.corpus.bunches(self.places, self.n_characters):
            yield from self.corpus.read(self.places[part])


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


def labels_of(
    corpora: list[Corpus], buckets: list[Bucket], label_names: tuple[str, ...]
) -> Iterator[int]:
    """The label of each document of all buckets."""
    index = {name: i for i, name in enumerate(label_names)}
    for bucket in buckets:
        corpus = corpora[bucket.source]
        numbers = [*(index[name] for name in corpus.label_names), -1]  # a label of -1 is the last
        yield from (numbers[label] for label in corpus.labels[bucket.documents.places].tolist())


def names_of(used: np.ndarray, corpora: list[Corpus], buckets: list[Bucket]) -> tuple[str, ...]:
    """The names of documents of all buckets."""
    sizes = [len(bucket.documents.places) for bucket in buckets]
    places = np.concatenate([bucket.documents.places for bucket in buckets])
    owner = np.repeat([bucket.source for bucket in buckets], sizes)
    return tuple(corpora[owner[i]].id(int(places[i])) for i in used)


def split_of(document: Document, config: TextConfig) -> int:
    """Return the split of a document as an index into SPLITS."""
    drawn = int.from_bytes(hashed(config.seed, "split", document.text)) / 2**64
    if drawn < config.explain:
        return 0
    return 1 if drawn < config.explain + config.score else 2


def hashed(*parts: object) -> bytes:
    """Return eight bytes that depend on all parts."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
