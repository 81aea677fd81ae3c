"""Opening a cache, and rows by number."""

import os
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

import activations_cache
from activations_cache import io, reader
from activations_cache.checks import CacheFormatError
from activations_cache.journal import seal, unseal
from activations_cache.reader import ActivationCache
from activations_cache.testing import LinearModel, synthetic_plan, write_synthetic
from activations_cache.writer import CacheWriter

PLAN = synthetic_plan({"a.1:out": 7, "a.2:in": 5}, n_examples=23)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that nobody changes: 8 shards of 61 rows, of which 48 are in use (32 in the last)."""
    path = tmp_path_factory.mktemp("reader") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "fsync", lambda descriptor: None)
        write_synthetic(path, PLAN)
    return path


@pytest.fixture
def cache(path: Path) -> ActivationCache:
    return activations_cache.open(path)


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy"))


def test_rows_come_in_the_order_asked_for(cache: ActivationCache):
    made = torch.Generator().manual_seed(3)
    rows = cache.rows()
    everything = {name: cache[name][rows] for name in cache.hook_points}
    for n in (0, 1, 2, 67, 1009):
        picked = torch.randint(len(rows), (n,), generator=made)
        for name, values in everything.items():
            assert torch.equal(cache[name][rows[picked]], values[picked])
            assert cache[name][rows[picked]].dtype == torch.float32


@pytest.mark.parametrize("n_bytes", [1, 4 * 3 * 7])
def test_rows_are_the_same_however_few_are_read_at_a_time(
    cache: ActivationCache, monkeypatch: pytest.MonkeyPatch, n_bytes: int
):
    rows = cache.rows().flip(0)
    at_once = {name: cache[name][rows] for name in cache.hook_points}
    monkeypatch.setattr(reader, "_BYTES_AT_ONCE", n_bytes)
    for name, whole in at_once.items():
        assert torch.equal(cache[name][rows], whole)


def test_a_slice_covers_the_valid_rows_among_its_numbers(cache: ActivationCache):
    rows = cache.rows()
    assert torch.equal(cache["a.1:out"][:], cache["a.1:out"][rows])
    inside = rows[(rows >= 40) & (rows < 70)]
    assert inside.tolist() == [*range(40, 48), *range(61, 70)]
    assert torch.equal(cache["a.1:out"][40:70], cache["a.1:out"][inside])
    assert torch.equal(cache["a.1:out"][40:70:3], cache["a.1:out"][inside[inside % 3 == 1]])
    assert torch.equal(cache["a.1:out"][-61:], cache["a.1:out"][7 * 61 : 8 * 61])
    assert cache.refs(slice(40, 70)).example.tolist() == cache.refs(inside).example.tolist()


@pytest.mark.parametrize("number", [48, 60, 7 * 61 + 32, 8 * 61, -1, 2**40])
def test_the_number_of_an_unused_row_is_refused(cache: ActivationCache, number: int):
    rows = torch.tensor([0, number, 1])
    for read in (cache["a.1:out"].__getitem__, cache.refs, cache.token_labels):
        with pytest.raises(IndexError, match=f"numbers that cache.rows\\(\\) gives, got {number}"):
            read(rows)


def test_rows_of_splits_are_disjoint_and_complete(cache: ActivationCache):
    split = LinearModel(PLAN).examples.split
    parts = {name: cache.rows((name,)) for name in ("explain", "score", "hold")}
    for index, rows in enumerate(parts.values()):
        assert len(rows) > 0
        assert (split[cache.refs(rows).example] == index).all()
    assert torch.equal(torch.cat(list(parts.values())).sort().values, cache.rows())
    both = torch.cat([parts["hold"], parts["explain"]]).sort().values
    assert torch.equal(cache.rows(("hold", "explain")), both)
    with pytest.raises(ValueError, match="splits must be among explain, score, hold, got 'test'"):
        cache.rows(("explain", "test"))


def test_examples_are_what_the_model_read(cache: ActivationCache):
    ours, theirs = cache.examples, LinearModel(PLAN).examples
    for name in ("tokens", "split", "source", "label"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert ours.source_names == ("prose", "glosses")
    assert cache.label_names == ours.label_names == theirs.label_names
    rows = cache.rows().flip(0)
    refs = cache.refs(rows)
    assert torch.equal(cache.token_labels(rows), theirs.label[refs.example, refs.position])


def test_without_labels_every_token_label_is_minus_one(tmp_path: Path):
    plan = synthetic_plan({"a.1:out": 7}, n_examples=5, n_labels=0)
    cache = write_synthetic(tmp_path, plan)
    assert cache.label_names == ()
    assert cache.examples.label is None
    assert not (tmp_path / "examples/label").exists()
    assert set(cache.token_labels(cache.rows()).tolist()) == {-1}


def test_an_unknown_hook_point_is_named_with_those_there_are(cache: ActivationCache):
    with pytest.raises(KeyError, match=r"must be one of a\.1:out, a\.2:in, got 'a.3:out'"):
        cache["a.3:out"]
    assert cache.hook_points == ("a.1:out", "a.2:in")
    assert [cache.d_model(name) for name in cache.hook_points] == [7, 5]


def test_no_directory_is_said(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="must be a directory with a cache, got no such"):
        activations_cache.open(tmp_path / "nowhere")


def test_not_a_cache_is_said(tmp_path: Path):
    with pytest.raises(CacheFormatError, match="must be a cache, got a directory without manifest"):
        activations_cache.open(tmp_path)


def test_unfinished_is_said_with_the_count_and_how_to_go_on(tmp_path: Path):
    with CacheWriter(tmp_path, PLAN) as writer:
        for shard in (0, 1, 2):
            writer.commit(LinearModel(PLAN).shard(shard))
    with pytest.raises(CacheFormatError) as caught:
        activations_cache.open(tmp_path)
    message = str(caught.value)
    assert "must be finished, got 3 of 8 shards; run the same `sae cache` command again" in message


def test_what_is_expected_is_compared_key_by_key(path: Path):
    identity = activations_cache.open(path).identity
    assert activations_cache.open(path, expect=identity).identity == identity
    activations_cache.open(path, expect={"dtype": "bfloat16", "hook_points": {"a.2:in": 5}})
    with pytest.raises(CacheFormatError, match="got another dtype: expected 'float32', got 'bfloa"):
        activations_cache.open(path, expect={"dtype": "float32"})
    with pytest.raises(
        CacheFormatError, match=r"another hook_points\.b:in: expected 5, got nothing"
    ):
        activations_cache.open(path, expect={"hook_points": {"b:in": 5}})


def test_the_fingerprint_is_of_the_identity_alone(path: Path, tmp_path: Path):
    plan = synthetic_plan({"a.2:in": 5, "a.1:out": 7}, n_examples=23)
    assert plan.fingerprint == activations_cache.open(path).fingerprint
    other = synthetic_plan({"a.1:out": 7, "a.2:in": 5}, n_examples=23, seed=1)
    assert other.fingerprint != plan.fingerprint


def flip(path: Path, at: int = 5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": lambda p: (p / "a.1:out/acts/c/3/0").unlink(),
    "truncated": lambda p: os.truncate(p / "a.1:out/acts/c/3/0", 61 * 7 * 2 - 1),
    "longer": lambda p: os.truncate(p / "a.1:out/acts/c/3/0", 61 * 7 * 2 + 1),
    "flipped": lambda p: flip(p / "a.1:out/acts/c/3/0"),
    "zeroed": lambda p: (p / "a.1:out/acts/c/3/0").write_bytes(bytes(61 * 7 * 2)),
    "swapped": lambda p: swap(p / "a.1:out/acts/c/3/0", p / "a.1:out/acts/c/4/0"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_chunk_is_named_when_it_is_touched_and_by_verify(copy: Path, kind: str):
    DAMAGE[kind](copy)
    cache = activations_cache.open(copy)
    assert len(cache["a.1:out"][: 3 * 61]) == 3 * 48
    for _ in range(2):
        with pytest.raises(CacheFormatError, match=r"shard 3 is damaged: .*/a\.1:out/acts/c/3/0 "):
            cache["a.1:out"][3 * 61 : 3 * 61 + 1]
    problems = cache.verify()
    assert len(problems) == (2 if kind == "swapped" else 1)
    assert problems[0].startswith("shard 3: ")
    with pytest.raises(CacheFormatError, match="shard 3 is damaged"):
        list(cache.batches(batch=13, seed=0))


@pytest.mark.parametrize("name", ["manifest.json", "journal.rank0.jsonl"])
def test_a_damaged_record_is_refused_at_open(copy: Path, name: str):
    flip(copy / name, 300)
    with pytest.raises(CacheFormatError, match=name):
        activations_cache.open(copy)


def test_a_missing_journal_is_refused_at_open(copy: Path):
    (copy / "journal.rank0.jsonl").unlink()
    with pytest.raises(CacheFormatError, match=r"journal is damaged: .* must exist"):
        activations_cache.open(copy)


@pytest.mark.parametrize("name", ["a.1:out/acts/zarr.json", "zarr.json", "a.2:in/mean/c/0"])
def test_verify_names_damaged_files_that_belong_to_no_shard(copy: Path, name: str):
    flip(copy / name)
    assert [str(copy / name) in text for text in activations_cache.open(copy).verify()] == [True]


def test_a_damaged_mean_is_refused(copy: Path):
    flip(copy / "a.1:out/mean/c/0")
    with pytest.raises(CacheFormatError, match=r"the mean of a\.1:out is damaged"):
        _ = activations_cache.open(copy)["a.1:out"].mean


def rewrite(path: Path, name: str, change: Callable[[bytes], bytes], **record: object) -> None:
    """Change a file of shard 0 and let the journal and the manifest agree with it."""
    data = change((path / name).read_bytes())
    (path / name).write_bytes(data)
    journal = path / "journal.rank0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    first = unseal(lines[0], "") | record
    first["files"][name] = io.describe(data)
    journal.write_bytes(b"".join([seal(first), *lines[1:]]))
    manifest = unseal((path / "manifest.json").read_bytes(), "")
    manifest["journals"] = {journal.name: io.describe(journal.read_bytes())}
    (path / "manifest.json").write_bytes(seal(manifest))


@pytest.mark.parametrize(
    ("name", "change", "record", "problem"),
    [
        ("rows/token/c/0", lambda d: d[4:8] + d[4:], {}, "rows/token must be the tokens"),
        ("rows/position/c/0", lambda d: d[:4] * 61, {}, "rows must ascend by example and position"),
        (
            "rows/example/c/0",
            lambda d: b"\x09\0\0\0" + d[4:],
            {},
            "row 0 must come from the shard's",
        ),
        ("rows/example/c/0", lambda d: d, {"valid_rows": 47}, "valid_rows must be 48, .* got 47"),
    ],
)
def test_verify_compares_rows_with_examples(
    copy: Path, name: str, change: Callable[[bytes], bytes], record: dict, problem: str
):
    rewrite(copy, name, change, **record)
    result = activations_cache.open(copy).verify()
    assert all(line.startswith("shard 0: ") for line in result)
    assert any(re.search(problem, line) for line in result)


def test_verify_reports_progress_and_finds_nothing_wrong(cache: ActivationCache):
    seen = []
    assert cache.verify(lambda done, total, unit: seen.append((done, total, unit))) == []
    assert seen == [(done, 8, "shards verified") for done in range(9)]


def test_the_facade_gives_functions_whatever_was_imported_before():
    for module in ("builder", "live", "reader", "hooks", "models"):
        import_module(f"activations_cache.{module}")
    assert len(dir(activations_cache)) == 22
    for name in dir(activations_cache):
        assert callable(getattr(activations_cache, name))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = activations_cache.nothing
