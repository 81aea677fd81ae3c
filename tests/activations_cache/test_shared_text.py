"""Several processes pack the text of a cache once; what is read is what was packed."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from activations_cache import corpus, io
from activations_cache.builder import build
from activations_cache.config import CacheConfig, TextConfig, TextSource
from activations_cache.documents import Document, documents
from activations_cache.shared_text import forget, packed_once
from activations_cache.text import PackedText, pack
from activations_cache.writer import LOCKS
from tests.activations_cache.ranks import build_in_ranks

N_RANKS = 3


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of several processes; what is synced when is tested elsewhere."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(io, "fsync", lambda descriptor: None)


@pytest.fixture(params=["context", "document"])
def packed(request, tiny_text_config: TextConfig, tiny_tokenizer) -> PackedText:
    config = replace(tiny_text_config, attention=request.param)
    return pack(config, tiny_tokenizer, n_rows=501, exclude_tokens=(3,))


def assert_same(first: PackedText, second: PackedText) -> None:
    for field in fields(PackedText):
        ours, theirs = getattr(first, field.name), getattr(second, field.name)
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        else:
            assert ours == theirs


def never() -> PackedText:
    raise AssertionError("the text is there already")


def test_each_source_is_read_by_one_process_and_the_cache_is_the_same(
    tiny_cache_config: CacheConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = replace(tiny_cache_config, rows_per_shard=tiny_cache_config.n_rows // N_RANKS)
    whole = build(config, tmp_path / "whole")
    log = tmp_path / "log"

    def logged(source: TextSource, name: str, *skipped: Any) -> Iterator[Document]:
        with log.open("a") as file:
            file.write(f"{name}\n")
        return documents(source, name, *skipped)

    monkeypatch.setattr(corpus, "documents", logged)
    assert build_in_ranks(N_RANKS, config, tmp_path / "cache") == [0] * N_RANKS
    assert len(log.read_text().splitlines()) == len(whole.examples.source_names)
    result = build(config, tmp_path / "cache")
    for name in whole.hook_points:
        assert torch.equal(result[name][result.rows()], whole[name][whole.rows()])
    assert not list((tmp_path / "cache" / LOCKS).glob("text.*"))


def test_what_is_read_is_what_was_packed(packed: PackedText, tmp_path: Path):
    assert_same(packed_once(tmp_path, {"n": 1}, lambda: packed), packed)
    assert_same(packed_once(tmp_path, {"n": 1}, never), packed)


def test_another_text_and_a_damaged_one_are_packed_anew(packed: PackedText, tmp_path: Path):
    packed_once(tmp_path, {"n": 1}, lambda: packed)
    with pytest.raises(AssertionError, match="there already"):
        packed_once(tmp_path, {"n": 2}, never)
    file = tmp_path / LOCKS / "text.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert_same(packed_once(tmp_path, {"n": 1}, lambda: packed), packed)
    (tmp_path / LOCKS / "text.json").write_text("{")
    assert_same(packed_once(tmp_path, {"n": 1}, lambda: packed), packed)
    forget(tmp_path)
    with pytest.raises(AssertionError, match="there already"):
        packed_once(tmp_path, {"n": 1}, never)
