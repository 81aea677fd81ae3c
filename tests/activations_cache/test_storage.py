"""Eight bits a number, and compressed archives: what is lost, what is saved, who can read it."""

from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr

import activations_cache
from activations_cache.checks import CacheFormatError
from activations_cache.layout import as_read, as_stored, layout_of, read_into, scale_of
from activations_cache.testing import LinearModel, synthetic_plan, write_synthetic

HOOK = "h.0:out"
MADE = torch.Generator().manual_seed(3)
ROWS = torch.randn(31, 67, generator=MADE) * torch.logspace(-20, 20, 31)[:, None]


def test_eight_bits_lose_at_most_half_a_step_of_the_row():
    read = as_read(ROWS, "int8")
    step = ROWS.abs().amax(1, keepdim=True) / 127
    assert ((read - ROWS).abs() <= 0.501 * step).all()
    assert ((read - ROWS).abs() > 0.4 * step).any()


def test_rounding_a_second_time_changes_no_bit():
    once = as_read(ROWS, "int8")
    assert torch.equal(as_read(once, "int8"), once)
    assert torch.equal(scale_of(once), scale_of(ROWS))


def test_stored_rows_come_back_bit_by_bit():
    once = as_read(ROWS, "int8")
    stored = as_stored(once, "int8")
    assert stored["acts"].dtype == np.int8
    assert abs(stored["acts"].astype(int)).max(axis=1).tolist() == [127] * 31
    result = torch.empty(31, 67)
    read_into(result, stored["acts"], stored["scale"], "int8")
    assert torch.equal(result, once)


def test_rows_of_zeros_and_of_denormals_are_stored():
    rows = torch.zeros(2, 5)
    rows[1, 3] = 1e-40
    assert torch.equal(as_read(rows, "int8"), torch.zeros(2, 5))


def test_numbers_that_are_not_finite_make_the_row_not_finite():
    rows = torch.ones(3, 5)
    rows[0, 1], rows[1, 2] = torch.inf, torch.nan
    assert as_read(rows, "int8").isfinite().all(1).tolist() == [False, False, True]


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_a_cache_gives_back_what_its_dtype_holds(tmp_path: Path, dtype, compression):
    plan = synthetic_plan({HOOK: 13}, n_examples=11, dtype=dtype, compression=compression)
    cache, model = write_synthetic(tmp_path, plan), LinearModel(plan)
    wanted = model(range(11))[HOOK][:, 1:].reshape(-1, 13)
    assert torch.equal(cache[HOOK][cache.rows()], as_read(wanted, dtype).float())
    norm = cache[HOOK].norms(cache.rows())
    assert torch.allclose(norm, cache[HOOK][cache.rows()].norm(dim=1), rtol=1e-6)
    assert cache.verify() == []


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_compressed_cache_is_read_by_other_libraries(tmp_path: Path, dtype):
    plain = synthetic_plan({HOOK: 13}, n_examples=11, dtype=dtype)
    packed = synthetic_plan({HOOK: 13}, n_examples=11, dtype=dtype, compression="zstd")
    write_synthetic(tmp_path / "plain", plain)
    write_synthetic(tmp_path / "packed", packed)
    path = f"{HOOK}/acts"
    wanted = np.concatenate([
        np.fromfile(tmp_path / "plain" / layout_of(plain).hooks[HOOK].acts.file(s), np.uint8)
        for s in range(plain.n_shards)
    ])
    array = zarr.open_array(tmp_path / "packed" / path, mode="r")
    assert (np.asarray(array[:]).reshape(-1).view(np.uint8) == wanted).all()
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(tmp_path / "packed" / path)},
    }
    theirs = tensorstore.open(spec).result().read().result()
    assert (theirs.reshape(-1).view(np.uint8) == wanted).all()


def test_compression_makes_the_files_of_repetitive_rows_smaller(tmp_path: Path):
    sizes = {}
    for compression in ("none", "zstd"):
        plan = synthetic_plan({HOOK: 13}, n_examples=11, compression=compression)
        write_synthetic(tmp_path / compression, plan)
        acts = layout_of(plan).hooks[HOOK].acts
        sizes[compression] = (tmp_path / compression / acts.file(0)).stat().st_size
    assert sizes["zstd"] < sizes["none"]


def test_a_damaged_compressed_shard_is_named(tmp_path: Path):
    plan = synthetic_plan({HOOK: 13}, n_examples=11, compression="zstd")
    write_synthetic(tmp_path, plan)
    file = tmp_path / layout_of(plan).hooks[HOOK].acts.file(1)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    cache = activations_cache.open(tmp_path)
    assert any("shard 1" in line for line in cache.verify())
    with pytest.raises(CacheFormatError, match="shard 1 is damaged"):
        cache[HOOK][cache.rows()]


def test_the_scales_are_part_of_the_format(tmp_path: Path):
    plan = synthetic_plan({HOOK: 13}, n_examples=11, dtype="int8")
    cache = write_synthetic(tmp_path, plan)
    acts, scale = (
        np.asarray(zarr.open_array(tmp_path / HOOK / name, mode="r")[:])
        for name in ("acts", "scale")
    )
    assert (scale.view(np.uint32) & 0xFF == 0).all()
    rows = torch.from_numpy(acts.astype(np.float32) * scale[:, None])[cache.rows()]
    assert torch.equal(rows, cache[HOOK][cache.rows()])
