"""Text speaks no control tokens, a context has one front, and ids are those of the model."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import activations_cache
from activations_cache.config import CacheConfig, ModelConfig, TextConfig, TextSource
from activations_cache.documents import Document, documents
from activations_cache.models import LoadedModel, require_positions
from activations_cache.text import pack
from activations_cache.tokens import Encoder, token_ids
from tests.activations_cache.test_pieces import MADE


def _with_front(name: str) -> PreTrainedTokenizerFast:
    made = MADE[name]()
    bos, eos = made.token_to_id("<s>"), made.token_to_id("</s>")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    unknown = "[UNK]" if made.token_to_id("[UNK]") is not None else "<unk>"
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token=unknown
    )


@pytest.mark.parametrize("name", ["byte level", "byte fallback", "word piece", "unigram"])
def test_a_text_speaks_control_tokens_only_where_it_is_asked(name: str):
    tokenizer = _with_front(name)
    encoder = Encoder(tokenizer)
    quoted = [Document("x", "the <s> cat</s>it<s>", None), Document("y", "the cat", None)]
    controls = set(tokenizer.convert_tokens_to_ids(["<s>", "</s>"]))
    split, plain = encoder.of_documents(quoted, speak=False)
    assert not controls & {*split, *plain}
    assert plain == tokenizer("the cat", add_special_tokens=False)["input_ids"]
    spoken, _ = encoder.of_documents(quoted, speak=True)
    assert controls <= {*spoken}
    assert encoder.front == [tokenizer.convert_tokens_to_ids("<s>")]


def test_the_front_needs_no_letter_that_the_tokenizer_knows():
    names = {name: i for i, name in enumerate(["<s>", "天", "气"])}
    made = Tokenizer(models.BPE(vocab=names, merges=[]))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == []
    assert Encoder(tokenizer).front == [0]


def test_a_tokenizer_that_encodes_nothing_is_refused():
    made = Tokenizer(models.WordLevel({"<s>": 0, "x": 1}, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.Split("x", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    with pytest.raises(ValueError, match="must encode what its tokens say, got nothing for 1"):
        Encoder(tokenizer)


def test_a_text_that_cannot_be_encoded_is_one_line():
    made = Tokenizer(models.WordLevel({"x": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    with pytest.raises(ValueError, match="documents d:3 to d:3 must be text that the tokenizer"):
        list(Encoder(tokenizer).of_documents([Document("d:3", "y", None)], speak=False))


@pytest.mark.parametrize("attention", ["context", "document"])
def test_a_chat_has_one_front_and_its_messages_speak_no_control_tokens(
    tmp_path: Path, attention: str
):
    tokenizer = _with_front("byte level")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    )
    chats = [[{"role": "user", "content": f"number {i} <s></s> the cat"}] for i in range(97)]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"text": chat}) for chat in chats))
    source = TextSource(path=str(file), chat=True)
    config = TextConfig(sources=(source,), context=53, attention=attention)
    packed = pack(config, tokenizer, n_rows=700, skip_positions=1)
    bos, eos = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    is_bos = packed.tokens == bos
    assert is_bos[:, 0].all()
    if packed.segments is None:
        assert int(is_bos.sum()) == len(is_bos)
    assert not (is_bos[:, 1:] & is_bos[:, :-1]).any()
    ends = (packed.tokens == eos).sum()
    assert 0 < ends <= len(set(packed.documents.flatten().tolist()))  # the template's alone


@pytest.mark.parametrize("form", ["jsonl", "parquet", "arrow file", "arrow stream"])
def test_ids_are_read_as_they_are(tmp_path: Path, form: str):
    tokenizer = _with_front("byte level")
    rows = [[1, 5 + i, 6, 7] for i in range(41)]
    table = pa.table({"input_ids": rows})
    file = tmp_path / f"ids.{form.split(' ')[0]}"
    if form == "jsonl":
        file.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    elif form == "parquet":
        parquet.write_table(table, file)
    else:
        new = pa.ipc.new_file if form == "arrow file" else pa.ipc.new_stream
        with new(str(file), table.schema) as writer:
            writer.write_table(table)
    source = TextSource(path=str(file), field="input_ids")
    results = list(documents(source))
    assert [(d.text, d.kind) for d in results[:2]] == [("1 5 6 7", "ids"), ("1 6 6 7", "ids")]
    config = TextConfig(sources=(source,), context=4, attention="document")
    packed = pack(config, tokenizer, n_rows=20, n_ids=len(tokenizer))
    assert (packed.tokens[:, 0] == 1).all()
    assert (packed.tokens[:, 2:] == torch.tensor([6, 7])).all()
    with pytest.raises(ValueError, match="document x must have ids from 0 to 5, the embeddings"):
        list(Encoder(tokenizer, 6).of_documents([Document("x", "5 6", None, "ids")], speak=False))


def test_records_without_text_are_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "a.jsonl"
    lines = [{"text": "one"}, {"text": None}, {"other": 1}, {"text": float("nan")}, {"text": "two"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    with caplog.at_level(logging.WARNING):
        results = list(documents(TextSource(path=str(file))))
    assert [(d.id, d.text) for d in results] == [("a:0", "one"), ("a:4", "two")]
    assert "3 records have nothing in field 'text'" in caplog.text
    assert "the first is record 2" in caplog.text


def test_tokens_to_exclude_are_ids_names_texts_or_all_special_ones():
    tokenizer = _with_front("byte level")
    n = len(tokenizer)
    the = tokenizer.convert_tokens_to_ids("the")
    assert token_ids(("special",), tokenizer, n) == (0, 1, 2)
    assert token_ids((7, "</s>", "the"), tokenizer, n) == tuple(sorted((7, 2, the)))
    with pytest.raises(ValueError, match="must name tokens of the model, got 'the cat it is'"):
        token_ids(("the cat it is",), tokenizer, n)
    with pytest.raises(ValueError, match=f"must lie from 0 to {n - 1}, got {n}"):
        token_ids((n,), tokenizer, n)


def test_excluded_tokens_give_no_row_and_are_in_the_identity(
    tiny_text_config: TextConfig, tiny_model_dir: Path, tmp_path: Path
):
    whole = CacheConfig(
        model=ModelConfig(path=str(tiny_model_dir), dtype="float32"), text=tiny_text_config,
        hook_points=("model.layers.1:out",), n_rows=401, rows_per_shard=311,
    )  # fmt: skip
    cache = activations_cache.build(whole, tmp_path / "whole")
    token = int(cache.refs(cache.rows()).token.mode().values)
    less = activations_cache.build(replace(whole, exclude_tokens=(token,)), tmp_path / "less")
    assert token not in less.refs(less.rows()).token
    assert len(less.rows(("explain", "score"))) >= 401
    assert list(less.identity["exclude_tokens"]) == [token]
    assert "exclude_tokens" not in cache.identity
    assert not cache.is_special(cache.rows()).any()
    again = activations_cache.open(tmp_path / "less")
    assert again.manifest.plan.exclude_tokens == (token,)
    every = tuple(range(307))
    with pytest.raises(ValueError, match="exclude_tokens must leave rows, got 307 tokens"):
        activations_cache.build(replace(whole, exclude_tokens=every), tmp_path / "none")


def test_a_context_longer_than_the_positions_of_the_model_is_refused():
    config = GPT2Config(n_positions=17, n_embd=8, n_layer=1, n_head=2, vocab_size=11)
    loaded = LoadedModel.__new__(LoadedModel)
    vars(loaded)["model"] = GPT2LMHeadModel(config)
    require_positions(17, loaded)
    with pytest.raises(ValueError, match="context must be at most 17, the positions of the model"):
        require_positions(18, loaded)
