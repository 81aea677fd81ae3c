"""Documents to contexts of equal length: joined and cut, or each for itself."""

import json
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from activations_cache.config import TextConfig
from activations_cache.documents import Document
from activations_cache.progress import Progress

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
