"""Text to token ids: what stands in front of a text, and that no text speaks control tokens.

A text that quotes `<|endoftext|>` means these characters. Tokenizers read the control token, which
is a sink of attention whose row can hold most of a cache's sum of squares. So the names of special
tokens in a text are split, by the tokenizer where it can and by cutting the text where it cannot.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from activations_cache.config import SPECIAL
from activations_cache.documents import Document
from activations_cache.pieces import special_ids
from monosema.checks import MonosemaError

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
    found: set[int] = set()
    known = tokenizer.get_vocab() if any(isinstance(t, str) for t in tokens) else {}
    for token in tokens:
        if token == SPECIAL:
            found |= special_ids(tokenizer)
        elif isinstance(token, str):
            ids = [known[token]] if token in known else Encoder(tokenizer).text(token)
            if len(ids) != 1:
                rule = "name tokens of the model"
                raise MonosemaError(
                    f"exclude_tokens must {rule}, got {token!r}, which is {len(ids)}"
                )
            found.add(ids[0])
        elif not 0 <= token < n_ids:
            raise MonosemaError(f"exclude_tokens must lie from 0 to {n_ids - 1}, got {token}")
        else:
            found.add(token)
    return tuple(sorted(found))
