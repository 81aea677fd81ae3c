"""What is known of each image lies beside the rows, under a hash that is part of the identity."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from activations_cache.builder import build
from activations_cache.checks import CacheFormatError
from activations_cache.config import CacheConfig
from activations_cache.images import (
    IMAGE_TABLE,
    SKIPPED,
    ImageRecord,
    SkippedImage,
    read_images,
    table_sha256,
    write_table,
)
from activations_cache.testing import synthetic_plan, write_synthetic

RECORDS = [
    ImageRecord("photos", "cat/ä.png", "cat", "explain", "0" * 64),
    ImageRecord("photos", "1", None, "hold", "1" * 64),
]
BROKEN = [SkippedImage("photos", "cat/b.png", "OSError: truncated")]


def test_each_line_is_an_image(tmp_path: Path):
    (tmp_path / ".locks").mkdir()
    write_table(tmp_path, RECORDS, BROKEN)
    lines = (tmp_path / IMAGE_TABLE).read_bytes().splitlines()
    assert [ImageRecord(**json.loads(line)) for line in lines] == RECORDS
    assert SkippedImage(**json.loads((tmp_path / SKIPPED).read_bytes())) == BROKEN[0]
    assert (
        table_sha256(RECORDS) == hashlib.sha256((tmp_path / IMAGE_TABLE).read_bytes()).hexdigest()
    )


def test_the_hash_tells_order_and_every_field():
    hashes = {table_sha256(RECORDS), table_sha256(RECORDS[::-1])}
    hashes |= {table_sha256([r._replace(label="dog") for r in RECORDS])}
    hashes |= {table_sha256([r._replace(split="score") for r in RECORDS])}
    assert len(hashes) == 4


def test_a_table_that_is_there_is_left_alone(tmp_path: Path):
    (tmp_path / ".locks").mkdir()
    write_table(tmp_path, RECORDS, BROKEN)
    write_table(tmp_path, RECORDS, [])
    assert (tmp_path / SKIPPED).read_bytes() != b""
    write_table(tmp_path, RECORDS[:1], [])
    assert len((tmp_path / IMAGE_TABLE).read_bytes().splitlines()) == 1


def test_a_cache_of_text_has_no_images(tiny_cache_config: CacheConfig, tmp_path: Path):
    text = build(replace(tiny_cache_config, n_rows=31), tmp_path / "cache")
    with pytest.raises(CacheFormatError, match="must be a cache of images, got one of text"):
        read_images(text)


def test_a_damaged_table_is_named_by_verify(tmp_path: Path):
    plan = synthetic_plan({"a.1:out": 7}, n_examples=5)
    images = {"table_sha256": table_sha256(RECORDS)}
    plan = replace(plan, made_from={**plan.made_from, "images": images})
    cache, table = write_synthetic(tmp_path, plan), tmp_path / IMAGE_TABLE
    assert cache.verify() == [f"{table} must exist, got no such file"]
    write_table(tmp_path, RECORDS, [])
    assert cache.verify() == []
    table.write_bytes(table.read_bytes() + b" ")
    (problem,) = cache.verify()
    assert problem.startswith(f"{table} must have sha256 {table_sha256(RECORDS)}, got ")
