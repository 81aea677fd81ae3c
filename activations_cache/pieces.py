r"""Pieces of a row: the text of each of its tokens, which joined are the text of the row.

A token has no text of its own. Its leading blank depends on where it stands, and it may hold half
of a character. So the row is decoded as a whole, and cut where its tokens end. A character that
several tokens make, by its bytes, by combining marks or by joiners, stands in the last of them;
the pieces before it are shorter, or empty. Half a character at an end of a row is left out.
"""

import codecs
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple, overload

import numpy as np
import regex
from jaxtyping import Int, Int32
from transformers import PreTrainedTokenizerBase as Tokenizer

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
        new = sorted(set(ids) - self._bytes.keys())
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
