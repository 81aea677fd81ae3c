r"""Text to packed contexts: which tokens the model reads, and in which split each of them lies.

Every document goes to one split by a hash of its text, so copies of a text never meet across
splits, whichever file they are in. The documents of one source and split are put in the order of
another hash, joined, and cut into contexts of equal length; what is left at the end is dropped.

Documents are joined by a blank line ("\n\n"), not by a special token: `<|endoftext|>` inside the
contexts of SmolLM2 is a second attention sink with a norm of 10,600 where text has 170, and costs
0.65 nats per token of text. A context begins with what the tokenizer puts before any text, which
is a BOS for Llama or Gemma and nothing for SmolLM2.

Documents to contexts of equal length: joined and cut, or each for itself.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from tempfile import SpooledTemporaryFile
from typing import IO, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int32
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.config import SPLITS, TRAINING_SPLITS, TextConfig
from activations_cache.corpus import (
    CHARACTERS_PER_TOKEN,
    MEMORY_BYTES,
    Corpus,
    Portion,
    hashed,
    names_and_labels,
    portions_of,
    source_names,
)
from activations_cache.tokens import Encoder

SEPARATOR = "\n\n"
NO_TOKEN = -1
"""Padding: the model reads something there, but it gives no row."""

_TOKENIZER_BATCH = 64


class Part(NamedTuple):
    """Contexts of one portion; for each token the index of its document there, or -1."""

    tokens: np.ndarray  # (example, pos)
    owners: np.ndarray  # (example, pos)
    segments: np.ndarray  # (example, pos): number of the piece of text in its context


class Packer:
    """Cuts the documents of one portion after another into contexts.

    With `attention: context` documents are joined by a blank line and cut wherever a context ends.
    With `attention: document` each is cut for itself, and every piece begins with what the
    tokenizer puts in front of a text; what is left of a context is padded where no more than
    `skip_positions` tokens of the next document would fit.

    Args:
        encoder: Turns text into ids.
        config: Length of a context, and how far attention reaches.
        n_contexts: Contexts of all portions, for the progress.
        skip_positions: Positions at the start of each piece that give no row.
        progress: Called with the number of tokens packed so far.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: TextConfig,
        n_contexts: int,
        skip_positions: int,
        progress: Progress,
    ):
        self._encoder = encoder
        self._separator = encoder.text(SEPARATOR)
        self._front = encoder.front
        self._context = config.context
        self._width = config.context - len(self._front)
        if self._width < 1:
            rule = f"exceed the {len(self._front)} tokens in front of every text"
            raise MonosemaError(f"context must {rule}, got {config.context}")
        self._by_document = config.attention == "document"
        self._least = max(len(self._front), skip_positions) + 1
        self._progress = progress
        self._n_done, self._n_wanted = 0, n_contexts * self._width

    def cut(self, portion: Portion, n_contexts: int) -> Part:
        """Return `n_contexts` contexts, or as many as the portion fills."""
        documents = self._documents(portion) if n_contexts else iter(())
        cutter = self._cut_alone if self._by_document else self._cut_joined
        return cutter(documents, n_contexts)

    def _cut_joined(self, documents: Iterable[tuple[int, list[int]]], n_contexts: int) -> Part:
        tokens, owners = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
        n_missing = n_contexts * self._width
        for owner, ids in documents:
            tokens.append(np.array(ids + self._separator, np.int32))
            owners.append(np.array([owner] * len(ids) + [-1] * len(self._separator), np.int32))
            self._report(min(len(tokens[-1]), n_missing))
            n_missing -= len(tokens[-1])
            if n_missing <= 0:
                break
        folded = self._fold(np.concatenate(tokens), n_contexts, self._front)
        front = [-1] * len(self._front)
        owned = self._fold(np.concatenate(owners), n_contexts, front)
        return Part(folded, owned, np.zeros_like(folded))

    def _cut_alone(self, documents: Iterable[tuple[int, list[int]]], n_contexts: int) -> Part:
        shape = (n_contexts, self._context)
        tokens, owners = np.full(shape, NO_TOKEN, np.int32), np.full(shape, -1, np.int32)
        segments, n_front = np.zeros(shape, np.int32), len(self._front)
        context, at, segment = 0, 0, 0
        for owner, document in documents:
            ids = document
            while ids and context < n_contexts:
                piece = [*self._front, *ids[: self._context - at - n_front]]
                ids, stop = ids[len(piece) - n_front :], at + len(piece)
                tokens[context, at:stop] = piece
                owners[context, at + n_front : stop] = owner
                segments[context, at:] = segment
                at, segment = stop, segment + 1
                self._report(len(piece) - n_front)
                if self._context - at < self._least:
                    context, at, segment = context + 1, 0, 0
            if context == n_contexts:
                break
        return Part(tokens[:context], owners[:context], segments[:context])

    def _documents(self, portion: Portion) -> Iterator[tuple[int, list[int]]]:
        """Yield the number and the ids of each document."""
        number, documents = 0, iter(portion.documents)
        while some := list(islice(documents, _TOKENIZER_BATCH)):
            for ids in self._encoder.of_documents(some, speak=portion.speak):
                yield number, ids
                number += 1

    def _report(self, n_new: int) -> None:
        self._n_done += n_new
        self._progress(min(self._n_done, self._n_wanted), self._n_wanted, "tokens packed")

    def _fold(self, stream: np.ndarray, n_contexts: int, front: list[int]) -> np.ndarray:
        n_full = min(len(stream) // self._width, n_contexts)
        body = stream[: n_full * self._width].reshape(n_full, self._width)
        return np.hstack([np.tile(np.array(front, np.int32), (n_full, 1)), body])


def positions_in_segments(segments: np.ndarray) -> np.ndarray:
    """Return for each token its position in its segment: (example, pos)."""
    position = np.arange(segments.shape[1])
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    return position - np.maximum.accumulate(np.where(begins, position, 0), axis=1)


class TooShort(MonosemaError):
    """The sources hold less text than was asked for."""


@dataclass(frozen=True)
class PackedText:
    """Contexts of equal length; none mixes two splits or two sources."""

    tokens: Int32[Tensor, "example pos"]
    """Token ids; -1 is padding."""
    split: Int[Tensor, " example"]
    """Index into SPLITS."""
    source: Int[Tensor, " example"]
    """Index into `source_names`."""
    documents: Int32[Tensor, "example pos"]
    """Index into `document_ids`; -1 for separators and for what the tokenizer puts in front."""
    segments: Int32[Tensor, "example pos"] | None
    """Number of the piece of text in its context; None where attention is by context."""
    labels: Int32[Tensor, "example pos"]
    """Index into `label_names`; -1 where the token belongs to no labelled document."""
    document_ids: tuple[str, ...]
    """The documents that occur, at least in part."""
    label_names: tuple[str, ...]
    """Labels of all documents of the sources, sorted; the same for every number of rows."""
    source_names: tuple[str, ...]
    """One name for each source: its file name."""
    exclude_tokens: tuple[int, ...]
    """Ids that give no row."""
    identity: dict[str, object]
    """A hash of the contents, and the configuration that led to them."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Records without a text by source, where there are any."""


def pack(
    config: TextConfig,
    tokenizer: Tokenizer,
    *,
    n_rows: int,
    skip_positions: int = 0,
    exclude_tokens: Sequence[int] = (),
    n_ids: int | None = None,
    progress: Progress | None = None,
) -> PackedText:
    """Pack enough contexts for `n_rows` rows of explain and score, and hold in proportion to it.

    Args:
        config: Sources, context length, fractions and seed.
        tokenizer: Turns text into ids.
        n_rows: Rows wanted from explain and score together, at least.
        skip_positions: Positions of each context that give no row.
        exclude_tokens: Ids that give no row.
        n_ids: Ids that the model has an embedding for; None where nobody knows.
        progress: Called with the number of documents looked at, then of tokens packed.

    Raises:
        FileNotFoundError: If a source does not exist.
        ValueError: If a source cannot be read or is too short; the message says what it gives.
    """
    given = _Given(config, Encoder(tokenizer, n_ids), skip_positions, tuple(exclude_tokens))
    report, n_characters = progress or silent, CHARACTERS_PER_TOKEN * n_rows
    with ExitStack() as open_files:

        def spool() -> IO[bytes]:
            return open_files.enter_context(SpooledTemporaryFile(MEMORY_BYTES))

        corpora = [
            Corpus(source, name, config, n_characters, report, spool)
            for source, name in zip(config.sources, source_names(config), strict=True)
        ]
        while True:
            try:
                return _packed(given, corpora, n_rows, report)
            except TooShort:  # of what was read; an endless stream has more
                n_characters *= 2
                more = [corpus.read_further(n_characters) for corpus in corpora]
                if not any(more):
                    raise


class _Given(NamedTuple):
    """What decides which tokens give rows."""

    config: TextConfig
    encoder: Encoder
    skip_positions: int
    exclude_tokens: tuple[int, ...]

    def n_rows(self, part: Part) -> int:
        """Rows that some contexts give."""
        inside = positions_in_segments(part.segments) >= self.skip_positions
        excluded = np.isin(part.tokens, self.exclude_tokens)
        return int((inside & (part.tokens != NO_TOKEN) & ~excluded).sum())


def _packed(given: _Given, corpora: list[Corpus], n_rows: int, report: Progress) -> PackedText:
    config, rows_per_context = given.config, given.config.context - given.skip_positions
    portions, n_wanted = portions_of(config, corpora), n_rows
    while True:
        quotas = _quotas(config, math.ceil(n_wanted / rows_per_context))
        packer = Packer(given.encoder, config, sum(quotas), given.skip_positions, report)
        parts = [packer.cut(portion, n) for portion, n in zip(portions, quotas, strict=True)]
        n_given = sum(given.n_rows(part) for part in _training(portions, parts))
        if given.exclude_tokens and not n_given and any(len(part.tokens) for part in parts):
            raise MonosemaError(
                f"exclude_tokens must leave rows, got {len(given.exclude_tokens)} tokens and no "
                "row that is none of them; exclude fewer"
            )
        if n_wanted > n_rows and any(
            len(part.tokens) < quota for part, quota in zip(parts, quotas, strict=True)
        ):
            raise TooShort(
                f"text must give at least {n_rows} rows of explain and score, got {n_given}: "
                "pieces of documents fill no whole contexts; lower cache.n_rows or add text"
            )
        _require_enough(config, n_wanted, rows_per_context, [len(part.tokens) for part in parts])
        if n_given >= n_rows:
            return _assemble(given, corpora, portions, parts)
        # Pieces of documents and padding give fewer rows than whole contexts would.
        n_wanted = math.ceil(n_wanted * n_rows / max(n_given, 1)) + rows_per_context


def _training(portions: list[Portion], parts: list[Part]) -> list[Part]:
    numbers = [SPLITS.index(name) for name in TRAINING_SPLITS]
    return [p for portion, p in zip(portions, parts, strict=True) if portion.split in numbers]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divide a whole number by weights, by the largest remainder; ties go to the first."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _quotas(config: TextConfig, n_training: int) -> list[int]:
    """Return the contexts wanted from each portion, in the order of `_read`."""
    shares = [source.share for source in config.sources]
    n_hold = math.ceil(n_training * config.hold / (config.explain + config.score) - 1e-9)
    quotas = []
    for training, hold in zip(
        apportion(n_training, shares), apportion(n_hold, shares), strict=True
    ):
        quotas += [*apportion(training, (config.explain, config.score)), hold]
    return quotas


def _require_enough(
    config: TextConfig, n_rows: int, rows_per_context: int, n_found: list[int]
) -> None:
    """Refuse text that is too short, and say how much it gives."""
    n_training = math.ceil(n_rows / rows_per_context)
    quotas = _quotas(config, n_training)
    filled = [found / quota if quota else 1.0 for found, quota in zip(n_found, quotas, strict=True)]
    worst = filled.index(min(filled))
    if filled[worst] >= 1:
        return
    # A little above what fits, as the quotas are rounded; then down to what does.
    n_fitting = min(n_training - 1, math.ceil((n_found[worst] + 3) * n_training / quotas[worst]))
    while any(n < quota for n, quota in zip(n_found, _quotas(config, n_fitting), strict=True)):
        n_fitting -= 1
    gives = n_fitting * rows_per_context
    name, split = source_names(config)[worst // len(SPLITS)], SPLITS[worst % len(SPLITS)]
    raise TooShort(
        f"text must give at least {n_rows} rows of explain and score, got {gives}: "
        f"{name} fills {n_found[worst]} of {quotas[worst]} contexts of {config.context} tokens "
        f"for {split}; lower cache.n_rows{f' to {gives}' if gives else ''} or add text"
    )


def _assemble(
    given: _Given, corpora: list[Corpus], portions: list[Portion], parts: list[Part]
) -> PackedText:
    """Put the contexts of all portions in one order that mixes them."""
    config = given.config
    origin = [
        (portion.source, portion.split, i)
        for portion, part in zip(portions, parts, strict=True)
        for i in range(len(part.tokens))
    ]
    order = sorted(range(len(origin)), key=lambda e: hashed(config.seed, "context", *origin[e]))
    source, split, _ = np.array(origin, np.int64)[order].T
    owners = _owners_in_every(portions, parts)[order]
    used = np.unique(owners[owners >= 0])
    label_names = tuple(sorted({name for corpus in corpora for name in corpus.label_names}))
    label_number: dict[str | None, int] = {name: i for i, name in enumerate(label_names)}
    document_ids, labels = names_and_labels(used, corpora, portions)
    # One more entry, which an owner of -1 takes.
    label_of = np.array([label_number.get(label, -1) for label in (*labels, None)], np.int32)
    documents = np.where(owners < 0, -1, np.searchsorted(used, owners)).astype(np.int32)
    tensors = {
        "tokens": np.concatenate([part.tokens for part in parts])[order],
        "split": split.copy(),
        "source": source.copy(),
        "documents": documents,
        "labels": label_of[documents],
    }
    segments = None
    if config.attention == "document":
        tensors["segments"] = np.concatenate([part.segments for part in parts])[order]
        segments = torch.from_numpy(tensors["segments"])
    return PackedText(
        **{n: torch.from_numpy(a) for n, a in tensors.items() if n != "segments"},
        segments=segments,
        document_ids=document_ids,
        label_names=label_names,
        source_names=source_names(config),
        exclude_tokens=given.exclude_tokens,
        identity=_identity(config, tensors),
        skipped={c.name: c.skipped.n for c in corpora if c.skipped.n},
    )


def _owners_in_every(portions: list[Portion], parts: list[Part]) -> np.ndarray:
    """Return the owners of all parts as indices into the documents of all portions."""
    offsets = np.cumsum([0] + [len(portion.documents) for portion in portions])[:-1]
    return np.concatenate([
        np.where(part.owners < 0, -1, part.owners + offset)
        for part, offset in zip(parts, offsets, strict=True)
    ])


def _identity(config: TextConfig, tensors: dict[str, np.ndarray]) -> dict[str, object]:
    digest = hashlib.sha256()
    for name in sorted(tensors.keys() - {"documents"}):
        digest.update(tensors[name].tobytes())
    settings = asdict(config)
    for source, name in zip(settings["sources"], source_names(config), strict=True):
        source["path"] = name  # the same text wherever it lies
        source["share"] = float(source["share"])
        for key in ("special_tokens", "shuffle_buffer"):  # they are newer than many caches
            if not source[key]:
                del source[key]
    settings["sources"] = list(settings["sources"])
    return {"text_sha256": digest.hexdigest(), "separator": SEPARATOR, **settings}
