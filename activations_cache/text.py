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
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int32
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from activations_cache.checks import Progress, silent
from activations_cache.config import SPLITS, TRAINING_SPLITS, TextConfig
from activations_cache.documents import Document, documents, source_name

SEPARATOR = "\n\n"
NO_TOKEN = -1
"""Padding: the model reads something there, but it gives no row."""

_TOKENIZER_BATCH = 64


class Bucket(NamedTuple):
    """The documents of one source and one split, in their order."""

    source: int
    split: int
    documents: list[Document]
    is_chat: bool = False


class Part(NamedTuple):
    """Contexts of one bucket; for each token the index of its document there, or -1."""

    tokens: np.ndarray  # (example, pos)
    owners: np.ndarray  # (example, pos)
    segments: np.ndarray  # (example, pos): number of the piece of text in its context


class Packer:
    """Cuts the documents of one bucket after another into contexts.

    With `attention: context` documents are joined by a blank line and cut wherever a context ends.
    With `attention: document` each is cut for itself, and every piece begins with what the
    tokenizer puts in front of a text; what is left of a context is padded where no more than
    `skip_positions` tokens of the next document would fit.

    Args:
        tokenizer: Turns text into ids.
        config: Length of a context, and how far attention reaches.
        n_contexts: Contexts of all buckets, for the progress.
        skip_positions: Positions at the start of each piece that give no row.
        progress: Called with the number of tokens packed so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: TextConfig,
        n_contexts: int,
        skip_positions: int,
        progress: Progress,
    ):
        self._tokenizer = tokenizer
        self._separator = self._ids([SEPARATOR])[0]
        self._front = _front(tokenizer)
        self._context = config.context
        self._width = config.context - len(self._front)
        if self._width < 1:
            rule = f"exceed the {len(self._front)} tokens in front of every text"
            raise ValueError(f"context must {rule}, got {config.context}")
        self._by_document = config.attention == "document"
        self._least = max(len(self._front), skip_positions) + 1
        self._progress = progress
        self._n_done, self._n_wanted = 0, n_contexts * self._width

    def cut(self, bucket: Bucket, n_contexts: int) -> Part:
        """Return `n_contexts` contexts, or as many as the bucket fills."""
        if n_contexts == 0:
            bucket = bucket._replace(documents=[])
        cutter = self._cut_alone if self._by_document else self._cut_joined
        return cutter(bucket, n_contexts)

    def _cut_joined(self, bucket: Bucket, n_contexts: int) -> Part:
        tokens, owners = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
        n_missing = n_contexts * self._width
        for owner, ids in self._documents(bucket):
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

    def _cut_alone(self, bucket: Bucket, n_contexts: int) -> Part:
        shape = (n_contexts, self._context)
        tokens, owners = np.full(shape, NO_TOKEN, np.int32), np.full(shape, -1, np.int32)
        segments, n_front = np.zeros(shape, np.int32), len(self._front)
        context, at, segment = 0, 0, 0
        for owner, document in self._documents(bucket):
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

    def _documents(self, bucket: Bucket) -> Any:
        """Yield the number and the ids of each document."""
        for start in range(0, len(bucket.documents), _TOKENIZER_BATCH):
            batch = bucket.documents[start : start + _TOKENIZER_BATCH]
            texts = [self._text(document, bucket.is_chat) for document in batch]
            yield from enumerate(self._ids(texts), start=start)

    def _text(self, document: Document, is_chat: bool) -> str:
        if not is_chat:
            return document.text
        messages = json.loads(document.text)
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False))

    def _report(self, n_new: int) -> None:
        self._n_done += n_new
        self._progress(min(self._n_done, self._n_wanted), self._n_wanted, "tokens packed")

    def _fold(self, stream: np.ndarray, n_contexts: int, front: list[int]) -> np.ndarray:
        n_full = min(len(stream) // self._width, n_contexts)
        body = stream[: n_full * self._width].reshape(n_full, self._width)
        return np.hstack([np.tile(np.array(front, np.int32), (n_full, 1)), body])

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def positions_in_segments(segments: np.ndarray) -> np.ndarray:
    """Return for each token its position in its segment: (example, pos)."""
    position = np.arange(segments.shape[1])
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    return position - np.maximum.accumulate(np.where(begins, position, 0), axis=1)


def _front(tokenizer: Tokenizer) -> list[int]:
    """Return what the tokenizer puts before any text, such as a BOS."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[: next(starts)]


class TooShort(ValueError):
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
    identity: dict[str, object]
    """A hash of the contents, and the configuration that led to them."""


def pack(
    config: TextConfig,
    tokenizer: Tokenizer,
    *,
    n_rows: int,
    skip_positions: int = 0,
    progress: Progress | None = None,
) -> PackedText:
    """Pack enough contexts for `n_rows` rows of explain and score, and hold in proportion to it.

    Args:
        config: Sources, context length, fractions and seed.
        tokenizer: Turns text into ids.
        n_rows: Rows wanted from explain and score together, at least.
        skip_positions: Positions of each context that give no row.
        progress: Called with the number of tokens packed so far.

    Raises:
        FileNotFoundError: If a source does not exist.
        ValueError: If a source cannot be read or is too short; the message says what it gives.
    """
    rows_per_context = config.context - skip_positions
    buckets, n_wanted = _read(config), n_rows
    while True:
        quotas = _quotas(config, math.ceil(n_wanted / rows_per_context))
        packer = Packer(tokenizer, config, sum(quotas), skip_positions, progress or silent)
        parts = [packer.cut(bucket, n) for bucket, n in zip(buckets, quotas, strict=True)]
        n_given = sum(_n_rows(part, skip_positions) for part in _training(buckets, parts))
        if n_wanted > n_rows and any(
            len(part.tokens) < quota for part, quota in zip(parts, quotas, strict=True)
        ):
            raise TooShort(
                f"text must give at least {n_rows} rows of explain and score, got {n_given}: "
                "pieces of documents fill no whole contexts; lower cache.n_rows or add text"
            )
        _require_enough(config, n_wanted, rows_per_context, [len(part.tokens) for part in parts])
        if n_given >= n_rows:
            return _assemble(config, buckets, parts)
        # Pieces of documents and padding give fewer rows than whole contexts would.
        n_wanted = math.ceil(n_wanted * n_rows / max(n_given, 1)) + rows_per_context


def _training(buckets: list[Bucket], parts: list[Part]) -> list[Part]:
    numbers = [SPLITS.index(name) for name in TRAINING_SPLITS]
    return [p for bucket, p in zip(buckets, parts, strict=True) if bucket.split in numbers]


def _n_rows(part: Part, skip_positions: int) -> int:
    inside = positions_in_segments(part.segments) >= skip_positions
    return int((inside & (part.tokens != NO_TOKEN)).sum())


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divide a whole number by weights, by the largest remainder; ties go to the first."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _quotas(config: TextConfig, n_training: int) -> list[int]:
    """Return the contexts wanted from each bucket, in the order of `_read`."""
    shares = [source.share for source in config.sources]
    n_hold = math.ceil(n_training * config.hold / (config.explain + config.score) - 1e-9)
    quotas = []
    for training, hold in zip(
        apportion(n_training, shares), apportion(n_hold, shares), strict=True
    ):
        quotas += [*apportion(training, (config.explain, config.score)), hold]
    return quotas


def _read(config: TextConfig) -> list[Bucket]:
    """Read all sources and deal their documents to the splits; the split varies fastest."""
    buckets = []
    for index, (source, name) in enumerate(zip(config.sources, _names(config), strict=True)):
        dealt: list[list[Document]] = [[] for _ in SPLITS]
        for document in documents(source, name):
            dealt[_split(document, config)].append(document)
        for split, part in enumerate(dealt):
            part.sort(key=lambda document: _hash(config.seed, "order", document.text))
            buckets.append(Bucket(index, split, part, source.chat))
    return buckets


def _split(document: Document, config: TextConfig) -> int:
    drawn = int.from_bytes(_hash(config.seed, "split", document.text)) / 2**64
    if drawn < config.explain:
        return 0
    return 1 if drawn < config.explain + config.score else 2


def _names(config: TextConfig) -> tuple[str, ...]:
    """Return the sources' file names, numbered where two are the same."""
    names = [source_name(source.path) for source in config.sources]
    repeats = [names[:i].count(name) for i, name in enumerate(names)]
    return tuple(f"{name}#{n + 1}" if n else name for name, n in zip(names, repeats, strict=True))


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
    name, split = _names(config)[worst // len(SPLITS)], SPLITS[worst % len(SPLITS)]
    raise TooShort(
        f"text must give at least {n_rows} rows of explain and score, got {gives}: "
        f"{name} fills {n_found[worst]} of {quotas[worst]} contexts of {config.context} tokens "
        f"for {split}; lower cache.n_rows{f' to {gives}' if gives else ''} or add text"
    )


def _assemble(config: TextConfig, buckets: list[Bucket], parts: list[Part]) -> PackedText:
    """Put the contexts of all buckets in one order that mixes them."""
    origin = [
        (bucket.source, bucket.split, i)
        for bucket, part in zip(buckets, parts, strict=True)
        for i in range(len(part.tokens))
    ]
    order = sorted(range(len(origin)), key=lambda e: _hash(config.seed, "context", *origin[e]))
    source, split, _ = np.array(origin, np.int64)[order].T
    every = [document for bucket in buckets for document in bucket.documents]
    owners = _owners_in_every(buckets, parts)[order]
    used = np.unique(owners[owners >= 0])
    label_names = tuple(sorted({d.label for d in every if d.label is not None}))
    label_ids = {None: -1} | {name: i for i, name in enumerate(label_names)}
    label_of = np.array([*(label_ids[d.label] for d in every), -1], np.int32)
    tensors = {
        "tokens": np.concatenate([part.tokens for part in parts])[order],
        "split": split.copy(),
        "source": source.copy(),
        "documents": np.where(owners < 0, -1, np.searchsorted(used, owners)).astype(np.int32),
        "labels": label_of[owners],  # an owner of -1 takes the last entry
    }
    segments = None
    if config.attention == "document":
        tensors["segments"] = np.concatenate([part.segments for part in parts])[order]
        segments = torch.from_numpy(tensors["segments"])
    return PackedText(
        **{n: torch.from_numpy(a) for n, a in tensors.items() if n != "segments"},
        segments=segments,
        document_ids=tuple(every[i].id for i in used),
        label_names=label_names,
        source_names=_names(config),
        identity=_identity(config, tensors),
    )


def _owners_in_every(buckets: list[Bucket], parts: list[Part]) -> np.ndarray:
    """Return the owners of all parts as indices into the documents of all buckets."""
    offsets = np.cumsum([0] + [len(bucket.documents) for bucket in buckets])[:-1]
    return np.concatenate([
        np.where(part.owners < 0, -1, part.owners + offset)
        for part, offset in zip(parts, offsets, strict=True)
    ])


def _identity(config: TextConfig, tensors: dict[str, np.ndarray]) -> dict[str, object]:
    digest = hashlib.sha256()
    for name in sorted(tensors.keys() - {"documents"}):
        digest.update(tensors[name].tobytes())
    settings = asdict(config)
    for source, name in zip(settings["sources"], _names(config), strict=True):
        source["path"] = name  # the same text wherever it lies
        source["share"] = float(source["share"])
    settings["sources"] = list(settings["sources"])
    return {"text_sha256": digest.hexdigest(), "separator": SEPARATOR, **settings}


def _hash(*parts: object) -> bytes:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
