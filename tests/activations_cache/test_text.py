"""Packing covers the text exactly, keeps splits apart, and is a function of its configuration."""

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from activations_cache import corpus, text
from activations_cache.checks import DiskFullError
from activations_cache.config import SPLITS, TextConfig, TextSource
from activations_cache.corpus import hashed as text_hash
from activations_cache.corpus import split_of
from activations_cache.documents import Document, documents
from activations_cache.text import SEPARATOR, PackedText, apportion, pack
from activations_cache.tokens import Encoder

texts = st.lists(
    st.text(alphabet="abc \n.", min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=29
)
configs = st.builds(
    lambda context, fractions, seed: {
        "context": context,
        "explain": fractions[0] / sum(fractions),
        "score": fractions[1] / sum(fractions),
        "hold": fractions[2] / sum(fractions),
        "seed": seed,
    },
    st.integers(2, 13),
    st.tuples(st.integers(1, 5), st.integers(0, 5), st.integers(0, 5)),
    st.integers(0, 3),
)


def expected_contexts(config: TextConfig, tokenizer) -> dict[tuple[int, int], list[tuple]]:
    """Every context of each source and split, in order; written as the docstring of pack says."""
    results = {}
    for i, source in enumerate(config.sources):
        every = list(documents(source))
        for k in range(len(SPLITS)):
            own = [d for d in every if split_of(d, config) == k]
            own.sort(key=lambda d: text_hash(config.seed, "order", d.text))
            joined = [
                token
                for d in own
                for text in (d.text, SEPARATOR)
                for token in tokenizer(text, add_special_tokens=False).input_ids
            ]
            n_full = len(joined) // config.context
            chunks = [joined[j * config.context : (j + 1) * config.context] for j in range(n_full)]
            results[i, k] = [tuple(chunk) for chunk in chunks]
    return results


def contexts(packed: PackedText, source: int, split: int) -> Counter:
    chosen = (packed.source == source) & (packed.split == split)
    return Counter(tuple(row) for row in packed.tokens[chosen].tolist())


def same(a: PackedText, b: PackedText) -> bool:
    tensors = ("tokens", "split", "source", "documents", "labels")
    return all(torch.equal(getattr(a, t), getattr(b, t)) for t in tensors) and (
        a.identity == b.identity and a.document_ids == b.document_ids
    )


@settings(max_examples=151, deadline=None)
@given(
    first=texts, second=texts, options=configs, n_rows=st.integers(1, 400), skip=st.integers(0, 1)
)
def test_packing_covers_exactly_and_splits_are_disjoint(
    tmp_path_factory, tiny_tokenizer, first, second, options, n_rows, skip
):
    folder = tmp_path_factory.mktemp("packing")
    sources = []
    for name, own in (("first", first), ("second", second)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
        sources.append(TextSource(path=str(path)))
    config = TextConfig(sources=tuple(sources), **options)
    rows_per_context = config.context - skip
    try:
        packed = pack(config, tiny_tokenizer, n_rows=n_rows, skip_positions=skip)
    except ValueError as error:
        gives = int(re.search(r"got (\d+):", str(error))[1])
        assert gives < n_rows
        if gives == 0:
            return
        n_rows = gives  # what the message offers must be true
        packed = pack(config, tiny_tokenizer, n_rows=n_rows, skip_positions=skip)

    n_training = int((packed.split < 2).sum())
    assert n_training == -(-n_rows // rows_per_context)
    expected = expected_contexts(config, tiny_tokenizer)
    for (source, split), every in expected.items():
        result = contexts(packed, source, split)
        assert result == Counter(every[: result.total()])
    texts_of = {k: set() for k in range(3)}
    read = {d.id: d.text for source in sources for d in documents(source)}
    for row, split in zip(packed.documents.tolist(), packed.split.tolist(), strict=True):
        texts_of[split] |= {read[packed.document_ids[d]] for d in row if d >= 0}
    assert not texts_of[0] & texts_of[1]
    assert not texts_of[0] & texts_of[2]
    assert not texts_of[1] & texts_of[2]
    assert same(packed, pack(config, tiny_tokenizer, n_rows=n_rows, skip_positions=skip))


def test_every_token_knows_its_document_and_label(tiny_text_config, tiny_tokenizer):
    packed = pack(tiny_text_config, tiny_tokenizer, n_rows=3001)
    read = {d.id: d for source in tiny_text_config.sources for d in documents(source)}
    assert packed.label_names == ("noun.animal", "noun.plant", "verb.motion")
    assert packed.source_names == ("tiny", "tiny_records")
    separator = tiny_tokenizer(SEPARATOR).input_ids
    for example in range(len(packed.tokens)):
        rows = zip(packed.documents[example], packed.tokens[example], strict=True)
        owned: dict[int, list[int]] = {}
        for document, token in rows:
            owned.setdefault(int(document), []).append(int(token))
        assert set(owned.pop(-1, [])) <= set(separator)
        for document, ids in owned.items():
            text = read[packed.document_ids[document]].text
            assert tiny_tokenizer.decode(ids) in text
            chosen = packed.documents[example] == document
            label = read[packed.document_ids[document]].label
            expected = -1 if label is None else packed.label_names.index(label)
            assert set(packed.labels[example][chosen].tolist()) == {expected}
    assert (packed.labels[packed.documents < 0] == -1).all()
    assert set(packed.documents.unique().tolist()) - {-1} == set(range(len(packed.document_ids)))


def test_shares_and_fractions_decide_the_counts(tiny_text_config, tiny_tokenizer):
    """90 training contexts: 60 and 30 by share 1 : 0.5; of each 2/3 explain; 10 hold on top."""
    packed = pack(tiny_text_config, tiny_tokenizer, n_rows=90 * 30, skip_positions=1)
    counts = Counter(zip(packed.source.tolist(), packed.split.tolist(), strict=True))
    assert counts == {(0, 0): 40, (0, 1): 20, (0, 2): 7, (1, 0): 20, (1, 1): 10, (1, 2): 3}
    assert packed.tokens.shape == (100, 31)
    assert packed.tokens.dtype == torch.int32


def test_sources_and_splits_are_mixed(tiny_text_config, tiny_tokenizer):
    packed = pack(tiny_text_config, tiny_tokenizer, n_rows=90 * 31)
    for third in (slice(0, 33), slice(33, 66), slice(66, 100)):
        assert set(packed.source[third].tolist()) == {0, 1}
        assert set(packed.split[third].tolist()) == {0, 1, 2}


def test_the_seed_and_nothing_else_changes_the_splits(tiny_text_config, tiny_tokenizer):
    packed = pack(tiny_text_config, tiny_tokenizer, n_rows=601)
    other = pack(replace(tiny_text_config, seed=4), tiny_tokenizer, n_rows=601)
    assert packed.identity["text_sha256"] != other.identity["text_sha256"]
    document = [Document(f"x:{i}", f"text {i}", None) for i in range(1009)]
    splits = [split_of(d, tiny_text_config) for d in document]
    counts = Counter(splits)
    assert counts[0] == pytest.approx(605, abs=60)
    assert counts[1] == pytest.approx(303, abs=50)
    # Splits must not move between releases: caches and explanations made earlier would leak.
    assert splits[:17] == [int(digit) for digit in "01210001001201221"]


def test_copies_of_a_text_lie_in_one_split_whatever_their_file(tiny_text_config):
    copies = [[Document(f"{n}:{i}", f"copy {i}", None) for i in range(97)] for n in "ab"]
    a, b = ([split_of(d, tiny_text_config) for d in own] for own in copies)
    assert a == b


def test_the_same_text_elsewhere_has_the_same_identity(tiny_text_config, tiny_tokenizer, tmp_path):
    moved = []
    for source in tiny_text_config.sources:
        copied = tmp_path / Path(source.path).name
        copied.write_bytes(Path(source.path).read_bytes())
        moved.append(replace(source, path=str(copied)))
    here = pack(tiny_text_config, tiny_tokenizer, n_rows=601).identity
    there = pack(replace(tiny_text_config, sources=tuple(moved)), tiny_tokenizer, n_rows=601)
    assert there.identity == here
    assert json.loads(json.dumps(here)) == here
    assert str(tmp_path) not in json.dumps(there.identity)


def test_sources_of_one_name_are_numbered(tmp_path, tiny_tokenizer):
    sources = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "same.txt"
        path.write_text(f"{folder} bund lo tis. " * 97)
        sources.append(TextSource(path=str(path)))
    config = TextConfig(sources=tuple(sources), context=7, explain=1.0, score=0.0, hold=0.0)
    packed = pack(config, tiny_tokenizer, n_rows=70)
    assert packed.source_names == ("same", "same#2")
    assert packed.document_ids == ("same:0", "same#2:0")


@pytest.mark.parametrize(
    ("template", "front"),
    [("<|endoftext|> $A", 1), ("<|endoftext|> <|endoftext|> $A <|endoftext|>", 2), ("$A", 0)],
)
def test_a_context_begins_with_what_the_tokenizer_puts_in_front(
    tiny_text_config, tiny_tokenizer, template, front
):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<|endoftext|>", 0)]
    )
    packed = pack(tiny_text_config, tokenizer, n_rows=601)
    assert packed.tokens.shape[1] == 31
    assert (packed.tokens[:, :front] == 0).all()
    assert (packed.tokens[:, front:] != 0).all()
    assert (packed.documents[:, :front] == -1).all()
    plain = pack(replace(tiny_text_config, context=31 - front), tiny_tokenizer, n_rows=601)
    assert torch.equal(packed.tokens[0, front:], plain.tokens[0])


def test_a_context_must_have_room_for_text(tiny_text_config, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> <|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    with pytest.raises(ValueError, match="context must exceed the 2 tokens in front of every text"):
        pack(replace(tiny_text_config, context=2), tokenizer, n_rows=601)


def test_text_that_is_too_short_says_how_much_it_gives(tiny_text_config, tiny_tokenizer):
    message = (
        r"text must give at least 1000000 rows of explain and score, got \d+: tiny fills \d+ of "
        r"\d+ contexts of 31 tokens for (explain|score|hold); lower cache\.n_rows to \d+ or add"
    )
    with pytest.raises(ValueError, match=message):
        pack(tiny_text_config, tiny_tokenizer, n_rows=1_000_000)


def test_text_shorter_than_a_context_gives_nothing(tmp_path, tiny_tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("Aeio bund.")
    config = TextConfig(sources=(TextSource(path=str(path)),), explain=1.0, score=0.0, hold=0.0)
    message = "got 0: short fills 0 of 1 contexts of 256 tokens for explain; lower cache.n_rows or"
    with pytest.raises(ValueError, match=message):
        pack(config, tiny_tokenizer, n_rows=1)


def test_only_as_many_documents_are_tokenised_as_are_needed(
    tiny_text_config, tiny_tokenizer, monkeypatch
):
    n_texts = []
    ids = Encoder.of_documents

    def counted(encoder: Encoder, documents: list[Document], *, speak: bool) -> Iterator[list[int]]:
        n_texts.append(len(documents))
        return ids(encoder, documents, speak=speak)

    monkeypatch.setattr(Encoder, "of_documents", counted)
    few = pack(tiny_text_config, tiny_tokenizer, n_rows=61)
    n_few = sum(n_texts)
    many = pack(tiny_text_config, tiny_tokenizer, n_rows=9001)
    assert n_few < (sum(n_texts) - n_few) / 2
    assert len(few.document_ids) < len(many.document_ids) / 3
    assert few.label_names == many.label_names


def test_a_source_larger_than_memory_is_read_once_and_packed_the_same(
    tiny_text_config, tiny_tokenizer, monkeypatch
):
    n_read = []

    def counted(source: TextSource, name: str, *skipped: Any) -> Iterator[Document]:
        n_read.append(name)
        return documents(source, name, *skipped)

    in_memory = pack(tiny_text_config, tiny_tokenizer, n_rows=9001)
    monkeypatch.setattr(corpus, "documents", counted)
    monkeypatch.setattr(text, "MEMORY_BYTES", 100)
    assert same(pack(tiny_text_config, tiny_tokenizer, n_rows=9001), in_memory)
    assert n_read == list(in_memory.source_names)


def test_a_full_disk_under_the_text_names_the_directory(
    tiny_text_config, tiny_tokenizer, monkeypatch
):
    message = r"must have room for the text of .*, got No space left on device; set TMPDIR to"
    with Path("/dev/full").open("r+b", 0) as full:
        monkeypatch.setattr(text, "SpooledTemporaryFile", lambda size: full)
        with pytest.raises(DiskFullError, match=message):
            pack(tiny_text_config, tiny_tokenizer, n_rows=61)


def test_progress_counts_tokens_to_the_end(tiny_text_config, tiny_tokenizer):
    calls = []
    pack(tiny_text_config, tiny_tokenizer, n_rows=90 * 31, progress=lambda *c: calls.append(c))
    assert calls[-1] == (100 * 31, 100 * 31, "tokens packed")
    packed = [c[0] for c in calls if c[2] == "tokens packed"]
    assert packed == sorted(packed)
    assert calls[0] == (1, 0, "documents looked at")


@settings(deadline=None)
@given(
    total=st.integers(0, 10**7),
    weights=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=7),
)
def test_apportion_gives_all_and_is_within_one_of_the_share(total, weights):
    counts = apportion(total, weights)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1 + 1e-6


def test_apportion_by_hand():
    assert apportion(10, [0.6, 0.3]) == [7, 3]
    assert apportion(1, [1.0, 1.0]) == [1, 0]
    assert apportion(5, [1.0, 0.0]) == [5, 0]


@pytest.mark.real
def test_the_shipped_texts_make_readable_contexts(smollm2):
    data = "package://sae/demo_data"
    novels = TextSource(path=f"{data}/austen.txt.gz", document_pattern="(?i)chapter ")
    glosses = TextSource(path=f"{data}/wordnet_glosses.jsonl.gz", field="gloss", label="supersense")
    packed = pack(TextConfig(sources=(novels, glosses)), smollm2.tokenizer, n_rows=20_011)
    assert len(packed.label_names) == 45
    assert "noun.animal" in packed.label_names
    assert (packed.labels[packed.source == 0] == -1).all()
    assert (packed.labels[packed.source == 1] >= 0).float().mean() > 0.9
    every = "".join(d.text for d in documents(novels))
    middle = smollm2.tokenizer.decode(packed.tokens[packed.source == 0][0, 100:120])
    assert middle.strip() in every
