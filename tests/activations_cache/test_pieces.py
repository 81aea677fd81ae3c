"""Pieces of a row join to its text, whatever the tokenizer and the script, and keep characters."""

import numpy as np
import pytest
import regex
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from activations_cache.tokens import BROKEN, Pieces, table_of

TEXTS = {
    "english": "The cat isn't on the mat; it sat there (1996).",
    "chinese": "今天天气很好、我们去公园散步。",
    "japanese": "猫が窓辺でカフェを飲む。",
    "korean": "고양이가 창가에서 잔다",
    "emoji": "rain 🌧️ family 👨‍👩‍👧‍👦 flag 🇩🇪 thumb 👍🏽 end",
    "hindi": "क्षत्रिय नमस्ते दुनिया",
    "persian": "می‌خواهم بروم",
    "arabic": "القِطَّةُ نائمة",
    "thai": "สวัสดีครับ ที่นี่",
    "marks": "cafe\u0301 nai\u0308ve Z\u0351\u036b\u0343a",
    "code": "def f(x):\n    return  {'a': x[1:]}\t# done\r\n\r\n",
    "replacement": "lost \ufffd and \ufffd\ufffd found",
}
SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = ["the cat sat on the mat", "it is there", "return the end", "今天天气", "दुनिया"]


def _byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=290, special_tokens=SPECIAL,
                                    initial_alphabet=alphabet, show_progress=False)
    )  # fmt: skip
    return made


def _byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral have it: the decoder strips the blank that was put in front."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"),
        normalizers.Replace(" ", "▁"),
    ])
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    made.train_from_iterator(
        ["▁" + text.replace(" ", "▁") for text in CORPUS],
        trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL + tokens, show_progress=False),
    )
    return made


def _word_piece() -> Tokenizer:
    letters = sorted(set("".join(TEXTS.values())) - set(" \n\r\t"))
    names = ["[UNK]", *SPECIAL, "the", "cat", "##t", *letters, *(f"##{c}" for c in letters)]
    made = Tokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return made


def _unigram() -> Tokenizer:
    letters = sorted(set("".join(TEXTS.values())) - {" "})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁the", -2.0), ("▁", -3.0)]
    made = Tokenizer(models.Unigram([*pieces, *((c, -4.0) for c in letters)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    return made


def _bpe_with_word_ends() -> Tokenizer:
    letters = sorted(set("".join(TEXTS.values())) - set(" \n\r\t"))
    names = ["<unk>", *letters, *(f"{c}</w>" for c in letters)]
    vocab = {n: i for i, n in enumerate(names)}
    model = models.BPE(vocab=vocab, merges=[], end_of_word_suffix="</w>", unk_token="<unk>")
    made = Tokenizer(model)
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder()
    return made


MADE = {
    "byte level": _byte_level, "byte fallback": _byte_fallback, "word piece": _word_piece,
    "unigram": _unigram, "word ends": _bpe_with_word_ends,
}  # fmt: skip


@pytest.fixture(scope="module", params=MADE)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    made = MADE[request.param]()
    if made.token_to_id("<s>") is None:
        return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    bos = ("<s>", made.token_to_id("<s>"))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>",
        unk_token="[UNK]" if made.token_to_id("[UNK]") is not None else "<unk>",
    )  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("with_front", [False, True])
def test_pieces_join_to_the_decoded_text(tokenizer, name: str, with_front: bool):
    ids = tokenizer(TEXTS[name], add_special_tokens=with_front)["input_ids"]
    pieces = Pieces(tokenizer).row(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    joined = "".join(pieces)
    whole = {m.end() for m in regex.finditer(r"\r|\n|\X", joined)}  # tokens may part these two
    assert set(np.cumsum([len(piece) for piece in pieces]).tolist()) - {0} <= whole


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
def test_half_a_character_at_an_end_is_left_out(name: str):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=MADE[name](), unk_token="<unk>")
    ids = tokenizer("猫 and 🐱", add_special_tokens=False)["input_ids"]
    pieces = Pieces(tokenizer).row([*ids[-2:], *ids, *ids[:2]])
    assert "".join(pieces).strip() == "猫 and 🐱"
    assert BROKEN not in "".join(pieces)
    assert len(pieces) == len(ids) + 4


def test_a_character_stands_where_its_last_token_is():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_level())
    ids = tokenizer("a猫b")["input_ids"]
    assert Pieces(tokenizer).row(ids) == ("a", "", "", "猫", "b")
    ids = tokenizer("xe\u0301")["input_ids"]
    assert Pieces(tokenizer).row(ids) == ("x", "", "", "e\u0301")


def test_padding_has_empty_pieces_and_a_special_token_keeps_its_own():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_level(), bos_token="<s>")
    mark = tokenizer("\u0301")["input_ids"]
    row = Pieces(tokenizer).row([1, *mark, -1, -1])
    assert row == ("<s>", "", "\u0301", "", "")


def test_a_token_alone_keeps_its_blank_and_shows_its_bytes():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_fallback(), unk_token="<unk>")
    pieces = Pieces(tokenizer, len(tokenizer) + 2)
    assert pieces[tokenizer.convert_tokens_to_ids("▁the")] == " the"
    assert pieces[tokenizer.convert_tokens_to_ids("<0xE4>")] == "<0xE4>"
    assert pieces[len(tokenizer) + 1] == ""  # the model has more ids than the tokenizer
    with pytest.raises(IndexError, match="must lie from 0 to"):
        pieces[len(tokenizer) + 2]


def test_a_table_holds_the_pieces_of_every_row():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_fallback(), unk_token="<unk>")
    rows = [tokenizer(text)["input_ids"] for text in ("the cat", "it is the end")]
    tokens = np.full((2, max(map(len, rows)) + 1), -1)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    table = table_of(tokens, Pieces(tokenizer))
    shown = ["".join(table.names[i] for i in row if i >= 0) for row in table.ids.tolist()]
    assert shown == ["the cat", "it is the end"]
    assert (table.ids[:, -1] == -1).all()


def test_a_list_of_strings_stands_for_each_id_everywhere():
    table = table_of(np.array([[0, 2, -1]]), (" a", " b", "c"))
    assert [table.names[i] if i >= 0 else None for i in table.ids[0]] == [" a", "c", None]
