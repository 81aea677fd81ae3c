"""Documents are found in plain text, JSON lines and Parquet; what is wrong costs one line."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from activations_cache.config import TextSource
from activations_cache.documents import Document, documents


def read(path: Path | str, **options: str) -> list[Document]:
    return list(documents(TextSource(path=str(path), **options)))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


RECORDS = [
    {"body": "One.", "kind": "a", "more": 1},
    {"body": "  ", "kind": "b", "more": 2},
    {"body": " Thrée. \n", "kind": None, "more": 3},
    {"body": "Four.", "kind": 7, "more": 4},
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
TEXT = "Title\nCHAPTER I\nOne.\nStill one, see CHAPTER II.\n\nCHAPTER II\nTwo.\n"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_plain_text_is_one_document_or_begins_new_ones_at_the_pattern(tmp_path, suffix):
    path = write(tmp_path / f"book.txt{suffix}", TEXT.encode())
    assert read(path) == [Document("book:0", TEXT.strip(), None)]
    assert read(path, document_pattern="CHAPTER [IVX]+$") == [
        Document("book:0", "Title", None),
        Document("book:1", "CHAPTER I\nOne.\nStill one, see CHAPTER II.", None),
        Document("book:2", "CHAPTER II\nTwo.", None),
    ]


def test_a_pattern_may_carry_flags_and_match_the_first_line(tmp_path):
    path = write(tmp_path / "book.txt", b"chapter 1\na\nChapter 2\nb")
    parts = [d.text for d in read(path, document_pattern="(?i)chapter")]
    assert parts == ["chapter 1\na", "Chapter 2\nb"]


def test_a_text_without_the_pattern_is_one_document(tmp_path):
    path = write(tmp_path / "book.txt", b"a\nb\n")
    assert [d.text for d in read(path, document_pattern="CHAPTER")] == ["a\nb"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_records_of_json_lines(tmp_path, suffix):
    path = write(tmp_path / f"r.jsonl{suffix}", LINES.replace(b"\n", b"\n\n", 1))
    assert read(path, field="body", label="kind") == [
        Document("r:0", "One.", "a"),
        Document("r:2", "Thrée.", None),
        Document("r:3", "Four.", "7"),
    ]
    assert [d.label for d in read(path, field="body")] == [None, None, None]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_records_of_parquet(tmp_path, suffix):
    records = [{**record, "kind": str(record["kind"] or "") or None} for record in RECORDS]
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "plain.parquet")
    path = write(tmp_path / f"r.parquet{suffix}", (tmp_path / "plain.parquet").read_bytes())
    assert read(path, field="body", label="kind") == [
        Document("r:0", "One.", "a"),
        Document("r:2", "Thrée.", None),
        Document("r:3", "Four.", "7"),
    ]


def test_lone_surrogates_are_replaced(tmp_path):
    path = write(tmp_path / "r.jsonl", b'{"text": "a\\ud800b"}\n')
    assert [d.text for d in read(path)] == ["a?b"]


def test_a_package_can_carry_text():
    first = next(documents(TextSource(path="package://sae/demo_data/austen.txt.gz")))
    assert first.id == "austen:0"
    assert first.text.startswith("EMMA\nBy Jane Austen")


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("a.txt", b"", {}, r"a\.txt must hold text, got no document that is not empty"),
        ("a.txt", b" \n\n", {"document_pattern": "X"}, r"a\.txt must hold text"),
        ("a.jsonl", b"", {}, r"a\.jsonl must hold text"),
        ("a.txt", b"\xff\xfe", {}, r"a\.txt must be a whole \.txt file in UTF-8, got 'utf-8'"),
        ("a.jsonl", b'{"text": "x"}\n{"te', {}, r"a\.jsonl line 2 must be JSON, got '\{\"te'"),
        ("a.jsonl", b"[1]\n", {}, r"a\.jsonl line 1 must be a JSON object, got \[1\]"),
        ("a.jsonl", LINES, {}, r"record 1 must have the field 'text', got body, kind, more"),
        (
            "a.jsonl",
            LINES,
            {"field": "body", "label": "knd"},
            r"record 1 must have the field 'knd', got body, kind, more",
        ),
        ("a.jsonl", LINES, {"field": "more"}, r"record 1 must have text in field 'more', got 1"),
        ("a.parquet", b"PAR1 not really", {}, r"a\.parquet must be a whole \.parquet file"),
    ],
)
def test_bad_files_cost_one_line(tmp_path, name, data, options, message):
    path = write(tmp_path / name, data)
    with pytest.raises(ValueError, match=message) as error:
        read(path, **options)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_the_field_names_what_it_has(tmp_path):
    parquet.write_table(pa.table({"a": ["x"], "b": [1]}), tmp_path / "r.parquet")
    for options, missing in (({}, "text"), ({"field": "a", "label": "c"}, "c")):
        message = f"must have the field '{missing}', got a, b"
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "r.parquet", **options)


def test_cut_compressed_files_are_refused(tmp_path):
    whole = gzip.compress(LINES * 97)
    for name, data in (("a.jsonl.gz", whole[:-17]), ("b.jsonl.gz", LINES)):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} must be a whole \.jsonl file in UTF-8, got"):
            read(path, field="body")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt must exist, got no such file"):
        read(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match=r"no package absent_texts; run `pip install"):
        read("package://absent_texts/a.txt")
