"""Text to token ids, and token ids back to the text of each token.

A text that quotes `<|endoftext|>` means these characters. Tokenizers read the control token, which
is a sink of attention whose row can hold most of a cache's sum of squares. So the names of special
tokens in a text are split, by the tokenizer where it can and by cutting the text where it cannot.

A token has no text of its own. Its leading blank depends on where it stands, and it may hold half
of a character. So a row is decoded as a whole, and cut where its tokens end. The joined pieces are
the text of the row. A character that several tokens make, by its bytes, by combining marks or by
joiners, stands in the last of them; the pieces before it are shorter, or empty. Half a character at
an end of a row is left out.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np
import regex
from jaxtyping import Int, Int32
from transformers import PreTrainedTokenizerBase as Tokenizer

from activations_cache.config import SPECIAL
from activations_cache.documents import Document
from monosema.checks import MonosemaError

BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no character."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ESCAPED = re.compile("[\udc80-\udcff]")
_CLUSTERS = regex.compile(r"\X")
_JOINING = regex.compile(
    r"[\p{GCB=Extend}\p{GCB=ZWJ}\p{GCB=SpacingMark}\p{GCB=Prepend}\p{GCB=RI}"
    r"\p{GCB=L}\p{GCB=V}\p{GCB=T}]"
)


class Pieces(Sequence[str]):
    """The pieces of rows of one tokenizer; as a sequence, each of its tokens alone.

    Args:
        tokenizer: Whose ids the rows hold.
        n_ids: Number of ids that may occur; a model can have more than its tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, n_ids: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._n_ids = max(len(tokenizer), n_ids or 0)
        self._special = special_ids(tokenizer)
        self._bytes: dict[int, bytes | None] = {}
        self._first: dict[int, bytes | None] = {}

    def __len__(self) -> int:
        """Return the number of ids."""
        return self._n_ids

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return a token alone, with its leading blank; bytes of half a character as numbers."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._n_ids))]
        if not 0 <= index < self._n_ids:
            raise IndexError(f"token id must lie from 0 to {self._n_ids - 1}, got {index}")
        self._learn([index])
        known = self._bytes[index]
        if known is not None:
            text = known.decode(errors="surrogateescape")
            return _ESCAPED.sub(lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", text)
        return str(self._tokenizer.convert_ids_to_tokens(index) or "")

    def row(self, ids: Iterable[int]) -> tuple[str, ...]:
        """Return one piece for each id; an id of -1, which is padding, has an empty one."""
        given = [int(i) for i in ids]
        real = [i for i in given if i >= 0]
        pieces = iter(self._row(real))
        return tuple(next(pieces) if i >= 0 else "" for i in given)

    def _row(self, ids: list[int]) -> list[str]:
        if not ids:
            return []
        whole, texts = self._decode([ids])[0], self._by_bytes(ids)
        if texts is None or "".join(texts).replace(BROKEN, "") != whole.replace(BROKEN, ""):
            texts = self._by_prefixes(ids, whole)
        pieces: list[str] = []
        start = 0
        for end, token in enumerate([*ids, None]):
            if token is None or token in self._special:
                pieces += _with_whole_clusters(texts[start:end])
                pieces += texts[end : end + 1]
                start = end + 1
        return pieces

    def _by_bytes(self, ids: list[int]) -> list[str] | None:
        """Return the characters that each token completes; None where a token's are not known."""
        self._learn(ids)
        known = [self._at_front(ids[0]), *(self._bytes[i] for i in ids[1:])]
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        parts = [part for part in known if part is not None]
        return [decoder.decode(part) for part in parts] if len(parts) == len(ids) else None

    def _by_prefixes(self, ids: list[int], whole: str) -> list[str]:
        """Cut the text where the longer and longer beginnings of the row leave it."""
        ends = [0]
        for text in self._decode([ids[:n] for n in range(1, len(ids))]):
            n_equal = next(
                (i for i, (a, b) in enumerate(zip(text, whole, strict=False)) if a != b),
                min(len(text.rstrip(BROKEN)), len(whole)),
            )
            ends.append(max(ends[-1], n_equal))
        return [whole[a:b] for a, b in zip(ends, [*ends[1:], len(whole)], strict=True)]

    def _learn(self, ids: Sequence[int]) -> None:
        """Find the bytes that tokens add to a text: what stands behind a token that is known."""
        # A difference of sets would go through all tokens that are known, each time.
        new = sorted({i for i in ids if i not in self._bytes})
        if not new:
            return
        anchor, before = self._anchor
        for token, text in zip(new, self._decode([[*anchor, i] for i in new]), strict=True):
            added = text[len(before) :] if text.startswith(before) else BROKEN
            self._bytes[token] = self._of_name(token) if BROKEN in added else added.encode()

    def _at_front(self, token: int) -> bytes | None:
        """Return what a token adds at the start of a text, where many lose their blank."""
        if token not in self._first:
            text = self._decode([[token]])[0]
            self._first[token] = self._bytes[token] if BROKEN in text else text.encode()
        return self._first[token]

    def _of_name(self, token: int) -> bytes | None:
        """Read the bytes of a token from its name, in either of the two ways to write them."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(match[1])
        if all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return None

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """A token that is a word or a part of one, and its text; any text if there is none."""
        ids = [i for i in range(len(self._tokenizer)) if i not in self._special]
        for start in range(0, len(ids), 256):
            some = ids[start : start + 256]
            for token, text in zip(some, self._decode([[i] for i in some]), strict=True):
                if text.strip().isalnum() and self._decode([[token, token]])[0].startswith(text):
                    return [token], text
        return [], ""

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return self._tokenizer.batch_decode(
            rows, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


class PieceTable(NamedTuple):
    """The pieces of many rows."""

    ids: Int32[np.ndarray, "example pos"]
    """Index into `names`; -1 for padding."""
    names: tuple[str, ...]
    """The different pieces."""


def table_of(tokens: Int[np.ndarray, "example pos"], strings: Sequence[str]) -> PieceTable:
    """Return the pieces of all rows.

    Args:
        tokens: Token ids; -1 where a row is shorter than the others.
        strings: `Pieces`, or what stands for each id wherever it occurs.
    """
    known: dict[str, int] = {}
    ids = np.full(tokens.shape, -1, np.int32)
    if isinstance(strings, Pieces):
        for row, out in zip(tokens, ids, strict=True):
            out[:] = [known.setdefault(piece, len(known)) for piece in strings.row(row.tolist())]
    else:
        used = np.unique(tokens[tokens >= 0]).tolist()
        number = {token: known.setdefault(str(strings[token]), len(known)) for token in used}
        ids[tokens >= 0] = [number[token] for token in tokens[tokens >= 0].tolist()]
    ids[tokens < 0] = -1
    return PieceTable(ids, tuple(known))


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of the tokens that control a model; a byte is none, whatever it is called."""
    added = tokenizer.added_tokens_decoder
    ids = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    return frozenset(i for i in ids if i not in added or not _BYTE_TOKEN.fullmatch(str(added[i])))


def _with_whole_clusters(texts: list[str]) -> list[str]:
    """Move the parts of a character to the piece in which it ends."""
    joined = "".join(texts)
    if joined.isascii() or not _JOINING.search(joined):
        return texts
    begin = np.arange(len(joined) + 1)  # of the character in which each place lies
    for cluster in _CLUSTERS.finditer(joined):
        if cluster[0] != "\r\n":
            begin[cluster.start() + 1 : cluster.end()] = cluster.start()
    ends = begin[np.cumsum([len(text) for text in texts])].tolist()
    return [joined[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: visible Latin-1 for itself, the rest from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + n): b for n, b in enumerate(hidden)}


_BYTE_OF = _byte_of_character()


_N_PROBES = 2048
_MARKS = [chr(code) for code in range(0xE000, 0xE100)]


class Encoder:
    """Turns documents into ids.

    Args:
        tokenizer: Of the model.
        n_ids: Ids that the model has an embedding for; None where nobody knows.

    Raises:
        ValueError: If the tokenizer encodes nothing of what its own tokens say.
    """

    def __init__(self, tokenizer: Tokenizer, n_ids: int | None = None) -> None:
        self._tokenizer, self._n_ids = tokenizer, n_ids
        unknown: Any = tokenizer.unk_token_id
        # The unknown token is what a text becomes, not what it says.
        self._controls = special_ids(tokenizer).difference([unknown])
        names = {str(n) for n in tokenizer.convert_ids_to_tokens(sorted(self._controls))}
        longest_first = sorted((n for n in names if len(n) > 1), key=lambda n: (-len(n), n))
        pattern = "|".join(map(re.escape, longest_first))
        self._names = re.compile(f"(?=(?:{pattern}))") if pattern else None
        self.front = self._front()
        """What the tokenizer puts before any text, such as a BOS."""

    def of_documents(self, documents: Sequence[Document], *, speak: bool) -> Iterator[list[int]]:
        """Yield the ids of each document, without what stands in front of every text.

        Args:
            documents: Texts, chats, or ids already.
            speak: Whether special tokens that a text names are read as such.

        Raises:
            ValueError: If a document cannot be encoded, or has ids that the model does not know.
        """
        texts = [d.text for d in documents if d.kind == "text"]
        ids_of_texts = iter(self._of_texts(texts, documents, speak=speak))
        for document in documents:
            match document.kind:
                case "text":
                    ids = next(ids_of_texts)
                case "chat":
                    ids = self._of_chat(document)
                case "ids":
                    ids = [int(i) for i in document.text.split()]
            self._check(ids, document)
            # A template writes the BOS itself, and a tokenised corpus can have it: one is enough.
            can_speak = speak or document.kind != "text"
            n_front = len(self.front) if can_speak and ids[: len(self.front)] == self.front else 0
            yield ids[n_front:]

    def text(self, text: str) -> list[int]:
        """Return the ids of one text, without control tokens."""
        return next(self.of_documents([Document("text", text, None)], speak=False))

    def _of_texts(
        self, texts: list[str], documents: Sequence[Document], *, speak: bool
    ) -> list[list[int]]:
        if not texts:
            return []
        try:
            if speak:
                return self._encode(texts)
            return [
                self._in_parts(text) if self._controls.intersection(ids) else ids
                for ids, text in zip(self._encode(texts, split=True), texts, strict=True)
            ]
        except Exception as error:  # the library raises Exception itself
            where = f"{documents[0].id} to {documents[-1].id}"
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise MonosemaError(
                f"documents {where} must be text that the tokenizer can encode, got {reason}"
            ) from error

    def _encode(self, texts: list[str], *, split: bool = False) -> list[list[int]]:
        options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
        if split:
            options["split_special_tokens"] = True
        return self._tokenizer(texts, **options)["input_ids"]

    def _in_parts(self, text: str) -> list[int]:
        """Encode what the tokenizer does not split: cut behind the first letter of each name."""
        cuts = [] if self._names is None else [m.start() + 1 for m in self._names.finditer(text)]
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [i for ids in self._encode(parts, split=True) for i in ids]

    def _of_chat(self, document: Document) -> list[int]:
        """Encode a chat: the template may speak control tokens, what the messages say may not."""
        mark = next(m for m in _MARKS if m not in document.text)
        messages = self._marked(json.loads(document.text), mark)
        written = str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        return [i for ids in self._encode(written.split(mark)) for i in ids]

    def _marked(self, entry: Any, mark: str) -> Any:
        """Put a mark into each name of a special token, wherever a message has one."""
        if isinstance(entry, dict):
            return {key: self._marked(value, mark) for key, value in entry.items()}
        if isinstance(entry, list):
            return [self._marked(value, mark) for value in entry]
        if not isinstance(entry, str) or self._names is None:
            return entry
        cuts = [m.start() + 1 for m in self._names.finditer(entry)]
        return mark.join(entry[a:b] for a, b in zip([0, *cuts], [*cuts, len(entry)], strict=True))

    def _check(self, ids: list[int], document: Document) -> None:
        if not ids:
            return
        if min(ids) < 0 or (self._n_ids is not None and max(ids) >= self._n_ids):
            wrong = next(i for i in ids if i < 0 or (self._n_ids or 0) <= i)
            rule = f"have ids from 0 to {(self._n_ids or 0) - 1}, the embeddings of the model"
            raise MonosemaError(
                f"document {document.id} must {rule}, got {wrong}; "
                "use the tokenizer that belongs to the model"
            )

    def _front(self) -> list[int]:
        """Find what stands before the ids of a text that the tokenizer itself can write."""
        tried = 0
        for text in _texts_of(self._tokenizer):
            plain = self._encode([text])[0]
            whole = self._tokenizer(text)["input_ids"]
            starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
            if plain and starts:
                return list(whole[: starts[0]])
            tried += 1
        raise MonosemaError(
            f"the tokenizer must encode what its tokens say, got nothing for {tried} of them"
        )


def _texts_of(tokenizer: Tokenizer) -> Iterator[str]:
    """The texts of the first tokens that are not special."""
    special = special_ids(tokenizer)
    for token in range(min(len(tokenizer), _N_PROBES)):
        text = "" if token in special else str(tokenizer.decode([token])).strip()
        if text:
            yield text


def token_ids(tokens: Sequence[int | str], tokenizer: Tokenizer, n_ids: int) -> tuple[int, ...]:
    """Return the ids that `exclude_tokens` names, ascending.

    Args:
        tokens: Ids, names of tokens or texts of one token, or `special` for all special ones.
        tokenizer: Of the model.
        n_ids: Ids that the model has an embedding for.

    Raises:
        ValueError: If one is no token.
    """
    results: set[int] = set()
    known = tokenizer.get_vocab() if any(isinstance(t, str) for t in tokens) else {}
    for token in tokens:
        if token == SPECIAL:
            results |= special_ids(tokenizer)
        elif isinstance(token, str):
            ids = [known[token]] if token in known else Encoder(tokenizer).text(token)
            if len(ids) != 1:
                rule = "name tokens of the model"
                raise MonosemaError(
                    f"exclude_tokens must {rule}, got {token!r}, which is {len(ids)}"
                )
            results.add(ids[0])
        elif not 0 <= token < n_ids:
            raise MonosemaError(f"exclude_tokens must lie from 0 to {n_ids - 1}, got {token}")
        else:
            results.add(token)
    return tuple(sorted(results))
