"""FORMAT.md is the contract: a cache made from the document alone, and ours read by others."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorstore
import torch
import zarr

import activations_cache
from activations_cache.checks import CacheFormatError
from activations_cache.layout import layout_of
from activations_cache.manifest import FORMAT_VERSION
from activations_cache.testing import LinearModel, synthetic_plan, write_synthetic

FORMAT = Path(activations_cache.__file__).with_name("FORMAT.md")
HOOK = "h.0:out"


def crc(data: bytes) -> str:
    return f"{google_crc32c.value(data):08x}"


def sealed(record: dict) -> bytes:
    body = json.dumps(record).encode()
    return b'{"crc32c": "' + crc(body).encode() + b'", "record": ' + body + b"}\n"


def described(data: bytes) -> dict:
    return {"bytes": len(data), "crc32c": crc(data)}


IDENTITY = {
    "model": "by hand",
    "hook_points": {HOOK: 7},
    "dtype": "bfloat16",
    "context": 3,
    "skip_positions": 1,
    "rows_per_shard": 5,
    "n_examples": 3,
    "source_names": ["a"],
    "label_names": [],
    "compression": "none",
    "has_segments": False,
}
"""3 examples in 2 shards: E = 5 // 2 = 2 and S = ceil(3 / 2) = 2."""

TOKENS = np.array([[10, 11, 12], [20, 21, 22], [30, 31, 32], [-1, -1, -1]], np.int32)
ROWS = np.random.default_rng(0).standard_normal((6, 7)).astype(np.float32)
BITS = ROWS.view(np.uint32) >> 16  # bfloat16 by truncation


def shard_arrays(shard: int, n_rows: int) -> dict[str, np.ndarray]:
    acts = np.zeros((5, 7), np.uint16)
    acts[:n_rows] = BITS[4 * shard : 4 * shard + n_rows]
    example = np.array([[0, 0, 1, 1, -1], [2, 2, -1, -1, -1]][shard], np.int32)
    position = np.array([[1, 2, 1, 2, -1], [1, 2, -1, -1, -1]][shard], np.int32)
    token = np.where(example >= 0, 10 * example + 10 + position, -1).astype(np.int32)
    return {
        f"{HOOK}/acts/c/{shard}/0": acts,
        f"{HOOK}/norm/c/{shard}": np.zeros(5, np.float32),
        f"{HOOK}/shard_mean/c/{shard}/0": np.zeros((1, 7), np.float64),
        f"rows/example/c/{shard}": example,
        f"rows/position/c/{shard}": position,
        f"rows/token/c/{shard}": token,
        f"examples/tokens/c/{shard}/0": TOKENS[2 * shard : 2 * shard + 2],
        f"examples/split/c/{shard}": np.array([[0, 2], [1, -1]][shard], np.int8),
        f"examples/source/c/{shard}": np.array([[0, 0], [0, -1]][shard], np.int32),
    }


def journal_line(shard: int, n_rows: int) -> bytes:
    arrays = shard_arrays(shard, n_rows)
    return sealed({
        "shard": shard,
        "attempt": 1,
        "valid_rows": n_rows,
        "n_quarantined": 0,
        "hooks": {HOOK: {"n_rows": 2, "sum_square_norm": 1.5, "n_nonfinite": 0}},
        "files": {name: described(array.tobytes()) for name, array in arrays.items()},
    })


def by_the_document(path: Path) -> None:
    """Write a cache with NumPy and JSON."""
    for name, array in (shard_arrays(0, 4) | shard_arrays(1, 2)).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(array.tobytes())
    journal, mean = journal_line(0, 4) + journal_line(1, 2), np.arange(7.0).tobytes()
    (path / "journal.rank0.jsonl").write_bytes(journal)
    (path / f"{HOOK}/mean/c").mkdir(parents=True)
    (path / f"{HOOK}/mean/c/0").write_bytes(mean)
    text = json.dumps(IDENTITY, sort_keys=True, separators=(",", ":"))
    plan = {
        "format_version": 1,
        "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        "identity": IDENTITY,
        "request": {},
    }
    quantiles = ("0", "0.01", "0.05", "0.5", "0.95", "0.99", "1")
    statistics = {
        "n_rows": 4,
        "mean_square_norm": 0.75,
        "norm_quantiles": dict.fromkeys(quantiles, 2.0),
        "n_nonfinite": 0,
    }
    manifest = plan | {
        "n_shards": 2,
        "n_rows": 6,
        "n_quarantined": 0,
        "statistics": {HOOK: statistics},
        "journals": {"journal.rank0.jsonl": described(journal)},
        "files": {f"{HOOK}/mean/c/0": described(mean)},
        "provenance": {},
    }
    (path / "plan.json").write_bytes(sealed(plan))
    (path / "manifest.json").write_bytes(sealed(manifest))


def test_a_cache_made_from_the_document_alone_is_read(tmp_path: Path):
    by_the_document(tmp_path)
    cache = activations_cache.open(tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_bytes())["record"]
    assert cache.fingerprint == record["fingerprint"]
    assert cache.rows().tolist() == [0, 1, 2, 3, 5, 6]
    assert torch.equal(cache[HOOK][cache.rows()], torch.from_numpy((BITS << 16).view(np.float32)))
    assert cache.rows(("hold",)).tolist() == [2, 3]
    assert cache.refs(cache.rows()).token.tolist() == [11, 12, 21, 22, 31, 32]
    assert cache.examples.tokens.tolist() == [[10, 11, 12], [20, 21, 22], [30, 31, 32]]
    assert cache[HOOK].mean.tolist() == list(range(7))
    assert cache[HOOK].mean_square_norm == 0.75
    assert cache.verify() == []


def test_a_record_of_another_version_is_refused_with_both_numbers(tmp_path: Path):
    by_the_document(tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_bytes())["record"]
    (tmp_path / "manifest.json").write_bytes(sealed(record | {"format_version": 2}))
    with pytest.raises(CacheFormatError, match="must have format_version 1, got 2; read it with"):
        activations_cache.open(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("hook_points", {"../../x:out": 7}), ("hook_points", {}), ("hook_points", {HOOK: 0}),
     ("dtype", "int4"), ("compression", "lz4"), ("context", 1), ("rows_per_shard", 1),
     ("n_examples", 0), ("n_examples", "3"), ("skip_positions", -1), ("source_names", 5)],
)  # fmt: skip
def test_an_identity_that_cannot_be_is_refused(tmp_path: Path, key: str, value: object):
    by_the_document(tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_bytes())["record"]
    record["identity"][key] = value
    (tmp_path / "manifest.json").write_bytes(sealed(record))
    with pytest.raises(CacheFormatError, match=r"manifest\.json must follow FORMAT\.md, got"):
        activations_cache.open(tmp_path)


@pytest.mark.parametrize("width", [8, 1 << 31])
def test_a_width_that_the_files_have_not_is_refused_before_rows_are_read(tmp_path, width):
    by_the_document(tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_bytes())["record"]
    record["identity"]["hook_points"][HOOK] = width
    (tmp_path / "manifest.json").write_bytes(sealed(record))
    with pytest.raises(CacheFormatError, match=f"got no {HOOK}/acts.* of {5 * width * 2:,} bytes"):
        activations_cache.open(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_zarr_and_tensorstore_read_what_the_reader_reads(tmp_path: Path, dtype: str):
    plan = synthetic_plan({"a.1:out": 7, "a.2:in": 5}, n_examples=23, dtype=dtype)
    cache = write_synthetic(tmp_path / "cache", plan)
    rows = cache.rows()
    group = zarr.open_group(tmp_path / "cache", mode="r")
    for hook_point in plan.hook_points:
        folder = str(tmp_path / "cache" / hook_point / "acts")
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": folder}}
        theirs = {
            "zarr": group[f"{hook_point}/acts"][:],
            "tensorstore": tensorstore.open(store).result().read().result(),
        }
        for acts in theirs.values():
            assert acts.shape == (plan.n_shards * plan.rows_per_shard, plan.hook_points[hook_point])
            stored = torch.from_numpy(acts[rows.numpy()])
            if dtype == "bfloat16":
                stored = stored.view(torch.int16).view(torch.bfloat16)
            assert torch.equal(stored.float(), cache[hook_point][rows])
        assert group[f"{hook_point}/acts"].attrs["torch_dtype"] == dtype


def test_every_array_is_plain_zarr(tmp_path: Path):
    plan = synthetic_plan({"a.1:out": 7}, n_examples=23)
    cache = write_synthetic(tmp_path / "cache", plan)
    group = zarr.open_group(tmp_path / "cache", mode="r")
    refs = cache.refs(cache.rows())
    for name in ("example", "position", "token"):
        column = group[f"rows/{name}"][:]
        assert column[cache.rows().numpy()].tolist() == getattr(refs, name).tolist()
        unused = np.setdiff1d(np.arange(len(column)), cache.rows().numpy())
        assert len(unused) > 0
        assert set(column[unused].tolist()) == {-1}
    examples = LinearModel(plan).examples
    for name in ("tokens", "split", "source", "label"):
        assert np.array_equal(group[f"examples/{name}"][:], getattr(examples, name).numpy())
    assert group["examples/label"].attrs["names"] == list(plan.label_names)
    assert np.allclose(group["a.1:out/mean"][:], cache["a.1:out"].mean.numpy(), rtol=1e-6)
    n_rows = plan.n_shards * plan.rows_per_shard
    assert group["a.1:out/norm"].shape == (n_rows,)
    assert group["a.1:out/shard_mean"].shape == (plan.n_shards, 7)


def test_the_document_names_the_version_and_every_array():
    text = FORMAT.read_text()
    assert f"version {FORMAT_VERSION}" in text.splitlines()[0]
    plan = synthetic_plan({"a.1:out": 7}, n_examples=23, dtype="int8")
    layout = layout_of(dataclasses.replace(plan, has_segments=True))
    arrays = [*layout.per_shard(), layout.hooks["a.1:out"].mean]
    documented = dict(re.findall(r"^\| `([^`]+/\w+)` \| (`[^|]+`) \|", text, re.MULTILINE))
    names = {array.path.replace("a.1:out", "{hook point}"): array.dtype for array in arrays}
    assert documented.keys() == names.keys()
    assert all(f"`{dtype}`" in documented[name] for name, dtype in names.items())
