"""What can be said of the text at a row: its word, the word before, its token, its source, ...

Concepts are sets of such values: what WordNet says a gloss is about, the words of a family of ours
(`demo_data/concept_families.json`), and names of WordNet's families of nouns.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import regex
import torch
from jaxtyping import Float, Int, Int32
from pyarrow import compute
from pyarrow import json as arrow_json
from torch import Tensor

from activations_cache.checks import locate
from activations_cache.tokens import PieceTable, table_of
from monosema.checks import MonosemaError, require
from sae.explain.config import Kind
from sae.explain.firings import ActivationRows

_LEAST_PAIR = 2
_WORD_BOUNDARY = regex.compile(r"(?w)\b")
_WORD_WITH_BLANKS = regex.compile(r"(?w)\s*\S.*?\b")


@runtime_checkable
class RowRefsLike(Protocol):
    """Where rows come from."""

    @property
    def example(self) -> Int[Tensor, " row"]:
        """Number of the example."""
        ...

    @property
    def position(self) -> Int[Tensor, " row"]:
        """Position in the example."""
        ...

    @property
    def token(self) -> Int[Tensor, " row"]:
        """Id of the token, or number of the patch."""
        ...


@runtime_checkable
class CachedTexts(Protocol):
    """The texts of a cache, as token ids."""

    @property
    def tokens(self) -> Int[Tensor, "example pos"]:
        """Token ids; -1 where an example is shorter than the others."""
        ...

    @property
    def source(self) -> Int[Tensor, " example"]:
        """Index into source_names."""
        ...

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources of text."""
        ...


@runtime_checkable
class Cache(Protocol):
    """What explaining needs of an activation cache."""

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Their names."""
        ...

    @property
    def examples(self) -> CachedTexts:
        """All texts."""
        ...

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels that records carry; empty without labels."""
        ...

    def rows(self, splits: tuple[str, ...]) -> Int[Tensor, " row"]:
        """Ids of the rows of these splits."""
        ...

    def refs(self, rows: Int[Tensor, " row"]) -> RowRefsLike:
        """Where these rows come from."""
        ...

    def token_labels(self, rows: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """Index into label_names for each of these rows, -1 for none."""
        ...

    def __getitem__(self, hook_point: str) -> ActivationRows:
        """The activations at a hook point."""
        ...


def sampled_rows(cache: Cache, hook_point: str, most: int) -> Float[Tensor, "row d_in"]:
    """Activations of about so many rows of the explain split, evenly spread; all of fewer."""
    ids = cache.rows(("explain",))
    return cache[hook_point][ids[:: max(1, len(ids) // most)]].cpu()


@dataclass(frozen=True)
class RowText:
    """The text at a sequence of rows, which stand in the order of (example, position)."""

    example: Int32[np.ndarray, " row"]
    """Number of the example."""
    position: Int32[np.ndarray, " row"]
    """Position in the example."""
    values: Mapping[Kind, Int32[np.ndarray, " row"]]
    """For each kind, the index of the row's value among the kind's names; -1 for none."""

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.example)


@dataclass(frozen=True)
class Words:
    """The words of all examples, each token standing for the whole word it belongs to."""

    word: Int32[np.ndarray, "example pos"]
    """Index into names; -1 where no character ends, as in padding."""
    previous: Int32[np.ndarray, "example pos"]
    """The word before that word in the example; -1 for none."""
    names: tuple[str, ...]
    """The words, lower-cased; what is neither letter nor digit is a word of its own."""

    def pairs(self) -> tuple[Int32[np.ndarray, "example pos"], tuple[str, ...]]:
        """Every two words in a row that come at least twice, and what they are called; -1: none."""
        key = self.previous.astype(np.int64) * len(self.names) + self.word
        begins = np.ones(key.shape, bool)  # a word of several tokens counts once
        begins[:, 1:] = key[:, 1:] != key[:, :-1]
        is_pair = (self.previous >= 0) & (self.word >= 0)
        known, count = np.unique(key[begins & is_pair], return_counts=True)
        known = known[count >= _LEAST_PAIR]
        place = np.minimum(np.searchsorted(known, key), max(len(known) - 1, 0))
        is_known = known[place] == key if len(known) else np.zeros(key.shape, bool)
        first, second = np.divmod(known, len(self.names))
        names = [f"{self.names[a]} {self.names[b]}" for a, b in zip(first, second, strict=True)]
        return np.where(is_known & is_pair, place, -1).astype(np.int32), tuple(names)


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split."""

    ids: Int[Tensor, " row"]
    """Their ids in the cache, in the order of (example, position)."""
    text: RowText
    """The text at them."""


class TextReader:
    """Reads the text at the rows of a cache; the names of the values hold for all splits."""

    def __init__(self, cache: Cache, token_strings: Sequence[str]) -> None:
        """Join the words of all examples.

        Args:
            cache: Whose texts are read.
            token_strings: `activations_cache.Pieces`, or what stands for each id everywhere.

        Raises:
            ValueError: If a token of the examples has no string.
        """
        self._cache = cache
        self._tokens = cache.examples.tokens.numpy()
        if self._tokens.min() < -1 or self._tokens.max() >= len(token_strings):
            raise MonosemaError(
                f"token ids must lie between 0 and {len(token_strings) - 1}, got "
                f"{self._tokens.min()} to {self._tokens.max()}; pass the strings of the tokenizer "
                "that made the cache"
            )
        self.pieces = table_of(self._tokens, token_strings)
        """The pieces of all examples."""
        self._words = join_words(self.pieces)
        self._pair, pair_names = self._words.pairs()
        longest = self._tokens.shape[1].bit_length()
        self.names: Mapping[Kind, Sequence[str]] = {
            "word": self._words.names,
            "previous word": self._words.names,
            "word pair": pair_names,
            "token": token_strings,
            "supersense": cache.label_names,
            "source": tuple(name.rsplit("/", 1)[-1] for name in cache.examples.source_names),
            "position": tuple(_position_name(bits) for bits in range(longest + 1)),
        }
        """What the values of each kind are called."""

    def read(self, split: str) -> SplitRows:
        """The rows of one split and the text at them."""
        ids = self._cache.rows((split,))
        refs = self._cache.refs(ids)
        order = np.lexsort((refs.position.numpy(), refs.example.numpy()))
        ids = ids[torch.from_numpy(order)]
        example = refs.example.numpy()[order].astype(np.int32)
        position = refs.position.numpy()[order].astype(np.int32)
        at = (example, position)
        values: dict[Kind, np.ndarray] = {
            "word": self._words.word[at],
            "previous word": self._words.previous[at],
            "word pair": self._pair[at],
            "token": self._tokens[at],
            "supersense": self._cache.token_labels(ids).numpy(),
            "source": self._cache.examples.source.numpy()[example],
            "position": np.frexp(position)[1],  # number of binary digits
        }
        for kind, array in values.items():
            values[kind] = array.astype(np.int32)
        return SplitRows(ids, RowText(example, position, values))


def join_words(table: PieceTable) -> Words:
    """Join tokens to words within each example.

    A word ends at a Unicode word boundary (UAX 29) between two tokens and at white space: "don't"
    is one word, a Chinese, Japanese or Thai character that is a token is one too. A token is never
    cut. Words are stripped of white space and lower-cased; white space itself stays.
    """
    names = [*table.names, ""]  # the last is that of padding
    pieces = np.array([name.strip().lower() or name for name in names], dtype=object)
    begins = np.array([word_begins([names[i] for i in row]) for row in table.ids.tolist()])
    first = np.flatnonzero(begins)
    ids: dict[str, int] = {}
    joined = np.add.reduceat(pieces[table.ids.ravel()], first)
    words = np.array([ids.setdefault(word, len(ids)) if word else -1 for word in joined], np.int32)
    before = np.concatenate([np.array([-1], np.int32), words[:-1]])
    before[first % begins.shape[1] == 0] = -1
    number = np.cumsum(begins.ravel()) - 1
    return Words(
        words[number].reshape(begins.shape), before[number].reshape(begins.shape), tuple(ids)
    )


def word_begins(pieces: Sequence[str]) -> list[bool]:
    """Say of each piece of a text whether a word begins with it."""
    text = "".join(pieces)
    bounds = {match.start() for match in _WORD_BOUNDARY.finditer(text)}
    begins, at, is_open = [], 0, False
    for piece in pieces:
        is_parted = at in bounds or text[at - 1 : at].isspace() or text[at : at + 1].isspace()
        begins.append(not begins or at == len(text) or (is_parted and not is_open))
        is_open = not piece  # what ends in the next piece began here
        at += len(piece)
    return begins


def words_with_blanks(text: str) -> list[str]:
    """Cut a text into its words and signs, each with the blanks before it."""
    return _WORD_WITH_BLANKS.findall(text)


def _position_name(n_bits: int) -> str:
    """Positions with this many binary digits: 0, 1, 2-3, 4-7, ..."""
    low, high = (1 << n_bits) // 2, (1 << n_bits) - 1
    return str(low) if low >= high else f"{low}-{high}"


FAMILIES = "package://sae/demo_data/concept_families.json"
GLOSSES = "package://sae/demo_data/wordnet_glosses.jsonl.gz"
_SHORTEST_NAME = 4  # shorter names are words of grammar as well: "it", "an", "who"


@dataclass(frozen=True, kw_only=True)
class ConceptFamily:
    """Concepts that belong together, and texts that tell the family from what is like it."""

    family: str
    """Its name."""
    about: str = ""
    """What it holds."""
    safety: bool = False
    """Whether a caution belongs beside every result."""
    words: Mapping[str, Sequence[str]]
    """By concept, the words that stand for it."""
    pos: Sequence[str] = ()
    """Texts of the family."""
    neg: Sequence[str] = ()
    """Controls: as many texts, alike in form and without it."""

    def __post_init__(self) -> None:
        """Check the texts against each other."""
        is_paired = len(self.pos) == len(self.neg) != 1
        rule = "be as many as pos, and not one alone"
        require(is_paired, f"neg of family {self.family!r}", rule, len(self.neg))


def concept_families(path: str = FAMILIES) -> list[ConceptFamily]:
    """Read families from a JSON list of objects.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    try:
        records = json.loads(locate(path).read_text(encoding="utf-8"))
        return [ConceptFamily(**record) for record in records]
    except (TypeError, json.JSONDecodeError) as error:
        raise MonosemaError(
            f"families must be a JSON list of objects with family, words, pos and neg, got {path} "
            f"with a problem: {error}"
        ) from error


class Concept(NamedTuple):
    """A set of values of one kind."""

    name: str
    family: str
    kind: Kind
    values: tuple[int, ...]
    safety: bool = False


def concepts_in(
    names: Mapping[Kind, Sequence[str]], families: Sequence[ConceptFamily]
) -> list[Concept]:
    """The concepts that these texts can show; their single words where they show none.

    A noun, with its plural in s, belongs to a family of WordNet if all its senses do. A word is a
    proxy of a concept.
    """
    number = {word: i for i, word in enumerate(names["word"])}
    concepts = [
        Concept(name, "what a gloss is about", "supersense", (i,))
        for i, name in enumerate(names["supersense"])
    ]
    for family in families:
        for name, words in family.words.items():
            values = tuple(number[word] for word in words if word in number)
            if values:
                concepts.append(Concept(name, family.family, "word", values, family.safety))
    nouns, forms = _families_of_nouns(), {}
    for word, i in number.items():
        noun = word if word in nouns else word.removesuffix("s")
        if noun in nouns:
            forms.setdefault(noun, []).append(i)
    concepts += [Concept(noun, nouns[noun], "word", tuple(at)) for noun, at in forms.items()]
    if not concepts:
        concepts = [Concept(w, "words", "word", (i,)) for w, i in number.items() if w.isalpha()]
    return concepts


@cache
def _families_of_nouns() -> dict[str, str]:
    """WordNet's lexicographer file of each noun whose senses all lie in that one."""
    glosses = arrow_json.read_json(locate(GLOSSES))
    words = glosses["words"].combine_chunks()
    files = glosses["supersense"].combine_chunks().take(words.value_parent_indices())
    senses = pa.table({
        "word": compute.call_function("utf8_lower", [words.flatten()]),
        "file": files,
    })
    of_word = senses.group_by("word").aggregate([("file", "count_distinct"), ("file", "min")])
    return {
        record["word"]: record["file_min"]
        for record in of_word.filter(compute.field("file_count_distinct") == 1).to_pylist()
        if record["file_min"].startswith("noun.")
        and record["file_min"] != "noun.Tops"
        and len(record["word"]) >= _SHORTEST_NAME
        and record["word"].isalpha()
    }
