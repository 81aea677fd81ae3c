"""Tokens become words, and rows know their text."""

import numpy as np
import pytest
import torch

from activations_cache.tokens import PieceTable, table_of
from sae.explain.text_at_rows import TextReader, join_words, word_begins, words_with_blanks

STRINGS = (
    " Hand", "some", ",", " clever", "Hand", " 19", "96", "\n", " don", "'t", "--", "é", " ", "X",
)  # fmt: skip


def _words(rows: list[list[int]]) -> list[list[tuple[str, str | None]]]:
    result = join_words(table_of(np.array(rows), STRINGS))
    return [
        [
            (result.names[word], result.names[before] if before >= 0 else None)
            for word, before in zip(words, befores, strict=True)
        ]
        for words, befores in zip(result.word.tolist(), result.previous.tolist(), strict=True)
    ]


def test_letters_are_joined_over_tokens_and_lower_cased():
    (result,) = _words([[0, 1, 11, 2, 3]])
    assert result == [
        ("handsomeé", None), ("handsomeé", None), ("handsomeé", None), (",", "handsomeé"),
        ("clever", ","),
    ]  # fmt: skip


def test_space_punctuation_and_line_ends_part_words():
    (result,) = _words([[5, 6, 7, 8, 9, 10, 4, 12, 13]])
    assert [word for word, _ in result] == [
        "1996", "1996", "\n", "don't", "don't", "--", "hand", " ", "x",
    ]  # fmt: skip
    assert [before for _, before in result] == [
        None, None, "1996", "\n", "\n", "don't", "--", "hand", " ",
    ]  # fmt: skip


def test_half_a_character_belongs_to_the_word_in_which_it_ends():
    pieces = [" ca", "", "fé", "", "猫", ".", ""]
    assert word_begins(pieces) == [True, False, False, True, False, True, True]
    table = PieceTable(np.array([[0, 1, 2, 1, 3, 4, 1]]), (" ca", "", "fé", "猫", "."))
    result = join_words(table)
    assert [result.names[i] if i >= 0 else None for i in result.word[0]] == [
        "café", "café", "café", "猫", "猫", ".", None,
    ]  # fmt: skip
    assert result.pairs()[1] == ()


@pytest.mark.parametrize(
    ("pieces", "begins"),
    [
        (["今天", "天", "气"], [True, True, True]),  # no blanks: each token is a word
        (["고양", "이가", " 잔다"], [True, False, True]),
        ([" नम", "स्ते", " दु", "निया"], [True, False, True, False]),
        (["السل", "ام", " عليكم"], [True, False, True]),
        (["foo", "_bar", "=", "3", ".14"], [True, False, True, True, False]),
        (["if", "\n", "    ", " return"], [True, True, True, True]),
        ([" naï", "ve", "\u2019", "s", "!"], [True, False, False, False, True]),
    ],
)
def test_words_end_where_unicode_says(pieces: list[str], begins: list[bool]):
    assert word_begins(pieces) == begins


def test_a_text_is_cut_into_words_with_their_blanks():
    assert words_with_blanks("don't go, दुनिया 猫猫!") == [
        "don't", " go", ",", " दुनिया", " 猫", "猫", "!",
    ]  # fmt: skip


def test_words_do_not_cross_examples():
    first, second = _words([[3, 0], [1, 2]])
    assert first[-1] == ("hand", "clever")
    assert second == [("some", None), (",", "some")]


def test_pairs_that_come_twice_are_known_and_stay_inside_examples():
    rows = np.array([[3, 0, 1, 2, 3], [2, 3, 0, 2, 0], [0, 1, 2, 3, 7]])
    result = join_words(table_of(rows, STRINGS))
    pair, names = result.pairs()
    assert set(names) == {"handsome ,", ", clever"}  # once: "clever handsome", ", hand", ...
    shown = [[names[i] if i >= 0 else "" for i in row] for row in pair.tolist()]
    assert shown == [
        ["", "", "", "handsome ,", ", clever"],
        ["", ", clever", "", "", ""],
        ["", "", "handsome ,", ", clever", ""],
    ]


def test_case_and_leading_space_do_not_make_another_word():
    result = join_words(table_of(np.array([[0, 2, 4]]), STRINGS))
    assert result.word[0, 0] == result.word[0, 2]


@pytest.fixture
def small(fake_cache):
    tokens = torch.tensor([[3, 0, 1, 2, 3], [4, 1, 7, 8, -1], [0, 1, 2, 3, 3]])
    return fake_cache(
        tokens=tokens,
        acts=torch.zeros(3, 5, 2),
        split=torch.tensor([0, 1, 0]),
        source=torch.tensor([0, 1, 1]),
        label=torch.tensor([[-1] * 5, [0, 0, -1, 1, -1], [-1, -1, 1, 1, 0]]),
        label_names=("noun.animal", "verb.motion"),
    )


def test_rows_of_a_split_know_their_text(small):
    reader = TextReader(small, STRINGS)
    split = reader.read("score")
    text = split.text

    def named(kind):
        return [reader.names[kind][v] if v >= 0 else None for v in text.values[kind].tolist()]

    assert text.example.tolist() == [1, 1, 1]
    assert text.position.tolist() == [1, 2, 3]
    assert named("word") == ["handsome", "\n", "don"]
    assert named("previous word") == [None, "handsome", "\n"]
    assert named("token") == ["some", "\n", " don"]
    assert named("supersense") == ["noun.animal", None, "verb.motion"]
    assert named("source") == ["glosses.jsonl"] * 3
    assert named("position") == ["1", "2-3", "2-3"]
    assert (split.ids == small.rows(("score",))).all()


def test_source_is_called_by_its_file_name(small):
    assert TextReader(small, STRINGS).names["source"] == ("novels.txt.gz", "glosses.jsonl")


def test_rows_are_put_in_the_order_of_the_text(small, monkeypatch):
    straight = small.rows(("explain",))
    monkeypatch.setattr(small, "rows", lambda splits: straight.flip(0))
    split = TextReader(small, STRINGS).read("explain")
    assert (split.ids == straight).all()
    assert (np.diff(split.text.example) >= 0).all()


def test_tokens_without_a_string_are_refused(small):
    with pytest.raises(ValueError, match="token ids must lie between 0 and 6, got -1 to 8"):
        TextReader(small, STRINGS[:7])
