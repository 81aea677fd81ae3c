"""Text from the `datasets` library and from chats: same documents, whatever the network does."""

import json
import random
from pathlib import Path

import datasets
import pytest

from activations_cache import documents as ours
from activations_cache.config import TextConfig, TextSource
from activations_cache.documents import documents
from activations_cache.text import pack

RECORDS = [{"gloss": f"sentence number {i}", "kind": f"kind {i % 3}"} for i in range(97)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def read(path: object, **fields) -> list[tuple[str, str | None]]:
    source = TextSource(path=f"dataset://{path}", field="gloss", label="kind", **fields)
    return [(document.text, document.label) for document in documents(source)]


EXPECTED = [(record["gloss"], record["kind"]) for record in RECORDS]


def test_a_saved_dataset_is_read_in_its_order(saved):
    assert read(saved) == EXPECTED
    assert read(saved, n_documents=13) == EXPECTED[:13]


def test_a_part_of_a_saved_dataset_is_read(tmp_path):
    parts = {"train": RECORDS[:5], "test": RECORDS[5:]}
    result = datasets.DatasetDict({n: datasets.Dataset.from_list(r) for n, r in parts.items()})
    result.save_to_disk(tmp_path / "parts")
    assert read(tmp_path / "parts", part="test") == EXPECTED[5:]
    with pytest.raises(ValueError, match="must have the part 'dev', got none"):
        read(tmp_path / "parts", part="dev")


def test_a_directory_of_parquet_is_read(tmp_path):
    (tmp_path / "files").mkdir()
    datasets.Dataset.from_list(RECORDS).to_parquet(tmp_path / "files" / "train.parquet")
    assert read(tmp_path / "files") == EXPECTED


class Flaky:
    """A stream whose every record may break, from a list."""

    def __init__(self, records: list, random: random.Random, share: float, start: int = 0):
        self.records, self.random, self.share, self.start = records, random, share, start

    def skip(self, n: int) -> "Flaky":
        return Flaky(self.records, self.random, self.share, self.start + n)

    def __iter__(self):
        for record in self.records[self.start :]:
            if self.random.random() < self.share:
                raise ConnectionResetError("connection reset by peer")
            yield record


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr(ours.time, "sleep", taken.append)
    return taken


def test_a_stream_that_breaks_gives_the_same_documents(monkeypatch, pauses):
    flaky = Flaky(RECORDS, random.Random(3), 0.1)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: flaky)
    assert read("org/name") == EXPECTED
    assert len(pauses) > 5


def test_a_stream_that_breaks_for_good_is_one_line(monkeypatch, pauses):
    flaky = Flaky(RECORDS, random.Random(3), 1.0)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: flaky)
    with pytest.raises(ValueError, match=r"dataset://org/name must be readable") as error:
        read("org/name")
    assert "ConnectionResetError" in str(error.value)
    assert "at record 0, 5 times" in str(error.value)
    assert sum(pauses) == 1 + 2 + 4 + 8


def test_the_hub_is_asked_for_a_stream_of_one_part(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return Flaky(RECORDS, random.Random(3), 0.0)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read("org/name", subset="en", part="validation", n_documents=3)
    assert asked == [(("org/name", "en"), {"split": "validation", "streaming": True})]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"path": "dataset://"}, "path must have the form dataset://NAME"),
        ({"path": "a.jsonl", "subset": "en"}, "subset must be absent where path is not dataset://"),
        ({"path": "a.jsonl", "part": ""}, "part must not be empty"),
        ({"path": "a.txt", "chat": True}, "chat must be false for plain text"),
        ({"path": "a.jsonl", "n_documents": 0}, "n_documents must be at least 1"),
        ({"path": "dataset://x", "document_pattern": "A"}, "document_pattern must be absent"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        TextSource(**fields)


CHAT = [{"role": "user", "content": "why so"}, {"role": "assistant", "content": "because"}]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"turns": CHAT, "n": i}) + "\n" for i in range(211)))
    return path


def test_the_chat_template_makes_the_text(tiny_tokenizer, chats, monkeypatch):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    source = TextSource(path=str(chats), field="turns", chat=True)
    text = TextConfig(
        sources=(source,), context=61, explain=1.0, score=0.0, hold=0.0, attention="document"
    )
    packed = pack(text, tiny_tokenizer, n_rows=61)
    first = packed.tokens[0][packed.segments[0] == 0]
    assert tiny_tokenizer.decode(first) == "[user] why so\n[assistant] because\n"


def test_what_is_no_chat_is_named(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"text": [{"role": "user"}]}) + "\n")
    with pytest.raises(ValueError, match="record 1 must have messages with role and content"):
        list(documents(TextSource(path=str(path), chat=True)))
