"""Damaged and malicious files: each is refused in one line, before a library sees it."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

import sae
from sae.pretrained import DictionaryFormatError
from sae.pretrained.files import Files

D, F = 7, 23
CFG = {"d_in": D, "k": 3, "num_latents": F}


@pytest.fixture
def directory(tmp_path, make, peer) -> Path:
    shapes = {"encoder.weight": (F, D), "encoder.bias": F, "W_dec": (F, D), "b_dec": D}
    peer.write(tmp_path / "cfg.json", CFG)
    peer.tensors(tmp_path / "sae.safetensors", make(**shapes))
    sae.load(tmp_path)
    return tmp_path


def refused(path, match):
    with pytest.raises(DictionaryFormatError, match=match) as caught:
        sae.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def header(record, data=b"") -> bytes:
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ONE = entry(0, 4, [1])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "with a header of at most"),
        (b"\x80\x02}q\x00.", "with a header of at most"),
        (struct.pack("<Q", 1 << 63) + b"{}", "with a header of at most 1,048,576 bytes"),
        (struct.pack("<Q", 2 << 20) + bytes(3 << 20), "with a header of at most"),
        (header(b"{"), "must be readable JSON"),
        (header(b"[" * 100_000), "must be readable JSON"),
        (header(b"[]"), "must be a JSON object, got list"),
        (header(b'{"a": NaN}'), "NaN is not a JSON number"),
        (header(b'{"a": 1, "a": 1}'), "the key 'a' stands twice"),
        (header(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "the key 'dtype' stands twice"),
        (header({str(i): ONE for i in range(65)}, bytes(4)), "at most 64 tensors, got 65"),
        (header({"a": ONE | {"dtype": "F8_E5M2"}}, bytes(4)), "got 'F8_E5M2' for 'a'"),
        (header({"a": 3}, bytes(4)), "got None for 'a'"),
        (header({"a": ONE, "b": ONE}, bytes(4)), "must be a whole safetensors file"),
        (header({"a": entry(0, 4, [2])}, bytes(4)), "must be a whole safetensors file"),
        (header({"a": entry(0, 4, [1])}, bytes(8)), "must be a whole safetensors file"),
        (header({"a": entry(0, 8, [2])}, bytes(4)), "must be a whole safetensors file"),
        (header({"a": entry(0, 4, [1 << 62, 1 << 62])}, bytes(4)), "a whole safetensors file"),
        (header({"a": entry(4, 0, [1])}, bytes(4)), "must be a whole safetensors file"),
        (header({"a": entry(0, 4, [-1])}, bytes(4)), "must be a whole safetensors file"),
        (header({"../a": ONE}, bytes(4)), r"unknown \['../a'\]"),
    ],
)
def test_bad_headers(directory, data, message):
    (directory / "sae.safetensors").write_bytes(data)
    refused(directory, message)


def test_every_truncation_is_seen(directory):
    whole = (directory / "sae.safetensors").read_bytes()
    for size in range(0, len(whole), 97):
        (directory / "sae.safetensors").write_bytes(whole[:size])
        refused(directory, "must be a whole safetensors file")


def test_numbers_that_are_not_finite(directory, make, peer):
    for bad in (np.nan, np.inf, -np.inf):
        given = make(**{"encoder.weight": (F, D), "encoder.bias": F, "W_dec": (F, D), "b_dec": D})
        given["W_dec"][5, 2] = bad
        peer.tensors(directory / "sae.safetensors", given)
        refused(directory, "dec_rows must hold finite numbers")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be readable JSON"),
        ("{" * 9, "must be readable JSON"),
        ('{"a":' * 100_000, "must be readable JSON"),
        ("[1]", "must be a JSON object, got list"),
        ('{"d_in": 7, "d_in": 8}', "the key 'd_in' stands twice"),
        ('{"d_in": Infinity}', "Infinity is not a JSON number"),
        ('{"d_in": 1e999, "k": 3}', "d_in must be a whole number"),
        (" " * (1 << 20) + "{}", "must have at most 1,048,576 bytes, got 1,048,578"),
    ],
)
def test_bad_json(directory, text, message):
    (directory / "cfg.json").write_text(text)
    refused(directory, message)


def test_bytes_that_are_no_text(directory):
    (directory / "cfg.json").write_bytes(b'{"a": "\xff\xfe"}')
    refused(directory, "must be readable JSON")


def test_links_out_of_the_directory_are_not_followed(directory, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "x"
    (directory / "sae.safetensors").rename(elsewhere)
    (directory / "sae.safetensors").symlink_to(elsewhere)
    refused(directory, "must lie inside .*, got a link out of it")
    (directory / "sae.safetensors").unlink()
    elsewhere.rename(directory / "renamed")
    (directory / "sae.safetensors").symlink_to("renamed")
    assert sae.load(directory).config.d_sae == F


def test_the_links_of_the_hub_s_cache_are_followed(directory, tmp_path_factory):
    repo = tmp_path_factory.mktemp("hub") / "models--org--name"
    snapshot, blobs = repo / "snapshots" / "abc" / "layer", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("cfg.json", "sae.safetensors"):
        (directory / name).rename(blobs / name)
        (snapshot / name).symlink_to(blobs / name)
    assert sae.load(snapshot).config.d_sae == F
    (snapshot / "cfg.json").unlink()
    (snapshot / "cfg.json").symlink_to("/etc/hostname")
    refused(snapshot, "got a link out of it")


def test_what_is_no_file_is_not_opened(directory):
    (directory / "sae.safetensors").unlink()
    os.mkfifo(directory / "sae.safetensors")
    with pytest.raises(DictionaryFormatError, match="must hold sae"):
        sae.load(directory, format="sparsify")


def test_what_is_read_is_hashed(directory):
    import hashlib

    files = Files(directory)
    files.json("cfg.json")
    digest = hashlib.sha256((directory / "cfg.json").read_bytes()).hexdigest()
    assert files.sha256 == {"cfg.json": digest}


@pytest.mark.parametrize("name", ["cfg.json", "sae.safetensors"])
def test_random_damage_is_read_or_refused_and_nothing_else(directory, name):
    rng = np.random.default_rng(7)
    whole = np.frombuffer((directory / name).read_bytes(), np.uint8)
    messages = []
    for _ in range(120):
        damaged = whole.copy()
        where = rng.integers(min(len(whole), 400), size=rng.integers(1, 4))
        damaged[where] = rng.integers(256, size=len(where))
        (directory / name).write_bytes(damaged[: len(whole) - rng.integers(2)])
        try:
            loaded = sae.load(directory)
        except DictionaryFormatError as error:
            messages.append(str(error))
        else:
            assert loaded.config.d_sae == F
    assert len(messages) > 60
    assert not any("\n" in message for message in messages)
