"""The encoder's kernels in Triton's interpreter, against float64 and the rule for ties."""

import math

import pytest
import torch

from sae_kernels import blocks, encode_triton
from sae_kernels.encode_triton import Operands, encode_topk, fused_product
from sae_kernels.select_triton import group_maxima, source_of

TILE = blocks.ProductTile(16, 64, 16, 4, 2)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles and rows so short that a small test has several of each."""
    monkeypatch.setattr(blocks, "product", lambda arch: TILE)
    monkeypatch.setattr(blocks, "DIRECT_KEYS", 31)


@pytest.fixture
def drawn(normal):
    """Operands of whole numbers, whose products are exact in float32 and full of ties."""

    def draw(batch, d_sae, width, dtype=torch.float32):
        numbers = (normal(batch, width), normal(d_sae, width, seed=1), normal(d_sae, seed=2))
        x, rows, bias = ((1.5 * v).round() for v in numbers)
        return Operands(x.to(dtype), rows.to(dtype), bias)

    return draw


def right_product(operands):
    x, rows, bias = (tensor.double() for tensor in operands)
    return x @ rows.T + bias


def assert_encodes(operands, k, oracle):
    pre = right_product(operands)
    best = oracle(pre, k)
    values, indices = encode_topk(*operands, k, False)
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int64)
    assert torch.equal(indices, best.sort(1).values)
    assert torch.equal(values.double(), pre.gather(1, indices))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 137, 3), (5, 131, 23), (3, 257, 37)], ids=str)
def test_encodes_by_either_way(shape, dtype, drawn, oracle, small_tiles, monkeypatch):
    taken = []
    true = encode_triton.fused_product
    monkeypatch.setattr(
        encode_triton, "fused_product", lambda *a: (taken.append("fused"), true(*a))[1]
    )
    operands = drawn(*shape, dtype)
    assert_encodes(operands, 5, oracle)
    assert taken == ([] if dtype == torch.float32 else ["fused"])
    monkeypatch.setattr(blocks, "MAX_FUSED_WIDTH", 2)
    assert_encodes(operands, 5, oracle)
    assert len(taken) <= 1


def test_encodes_with_the_tiles_of_a_gpu(drawn, oracle):
    assert_encodes(drawn(3, 2311, 67, torch.float16), 7, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 1), (17, 131, 23), (37, 64, 16)], ids=str)
@pytest.mark.parametrize("size", [8, 32])
def test_the_product_and_its_maxima_agree(shape, dtype, size, drawn, normal, error, small_tiles):
    operands = drawn(*shape, dtype)
    x = normal(*operands.x.shape, seed=3, dtype=dtype)
    operands = operands._replace(x=x)
    for stored in (torch.float32, torch.float16):
        pre = torch.empty(shape[0], shape[1], dtype=stored)
        maxima = fused_product(operands, pre, size)
        assert error(pre, right_product(operands)) < (1e-6 if stored == torch.float32 else 1e-3)
        assert torch.equal(maxima, group_maxima(source_of(pre), size))


def test_chunks_of_rows_change_nothing(drawn, small_tiles, monkeypatch):
    operands = drawn(5, 131, 19, torch.float16)
    whole = encode_topk(*operands, 5, True)
    for n_rows in (1, 2):
        monkeypatch.setattr(blocks, "WORKSPACE_BYTES", n_rows * 131 * 4)
        parts = encode_topk(*operands, 5, True)
        assert torch.equal(parts[0], whole[0])
        assert torch.equal(parts[1], whole[1])


def test_the_workspace_is_bounded(drawn, small_tiles, monkeypatch):
    seen = []
    true = encode_triton._encode_chunk
    monkeypatch.setattr(
        encode_triton, "_encode_chunk", lambda o, pre, *a: (seen.append(pre), true(o, pre, *a))[1]
    )
    monkeypatch.setattr(blocks, "WORKSPACE_BYTES", 2 * 131 * 4)
    encode_topk(*drawn(5, 131, 3), 3, True)
    assert [len(pre) for pre in seen] == [2, 2, 1]
    assert len({pre.data_ptr() for pre in seen}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_relu_nan_and_inf(dtype, drawn, small_tiles):
    operands = drawn(3, 131, 5, dtype)
    operands.x[1, 2] = math.nan
    operands.bias[[70, 90]] = torch.tensor([math.inf, -math.inf])
    values, indices = encode_topk(*operands, 61, True)
    assert indices[1].tolist() == list(range(61))
    assert values[1].isnan().all()
    assert not values[[0, 2]].isnan().any()
    assert (values[[0, 2]] >= 0).all()
    assert (indices[0] == 70).any()
    assert not (indices[0] == 90).any()
    plain, same = encode_topk(*operands, 61, False)
    assert torch.equal(same, indices)
    assert torch.equal(plain[[0, 2]].relu(), values[[0, 2]])


def test_runs_repeat(normal, small_tiles):
    for dtype in DTYPES:
        x, rows = normal(5, 23, dtype=dtype), normal(131, 23, seed=1, dtype=dtype)
        first, again = (encode_topk(x, rows, normal(131, seed=2), 7, True) for _ in range(2))
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_no_rows(drawn):
    values, indices = encode_topk(*drawn(0, 23, 5), 3, True)
    assert values.shape == indices.shape == (0, 3)


def test_more_than_a_program_can_hold_is_sorted(drawn, oracle, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_K", 6)
    for dtype in (torch.float32, torch.float16):
        assert_encodes(drawn(3, 131, 5, dtype), 7, oracle)


def test_short_16_bit_rows_are_fused():
    assert blocks.fuses(131072, 768, 2, 32)
    assert not blocks.fuses(131072, 768, 4, 32)
    assert not blocks.fuses(131072, 2304, 2, 32)
    assert not blocks.fuses(2048, 768, 2, 32)  # no groups, so no maxima to save a pass with


@pytest.mark.parametrize("arch", [80, 86, 90, 100])
def test_groups_divide_the_tile(arch):
    assert blocks.product(arch).latents % blocks.MAX_GROUP == 0


def test_chunks_are_whole_tiles_where_the_workspace_holds_one():
    assert blocks.rows_at_a_time(8192, 131072) == 2048
    assert blocks.rows_at_a_time(8192, 131071) == 2048
    assert blocks.rows_at_a_time(8191, 24577) == 8191
    assert blocks.rows_at_a_time(100_000, 24577) == 85 * 128
    assert blocks.rows_at_a_time(8192, 1 << 22) == 64
    assert blocks.rows_at_a_time(8192, 1 << 29) == 1
    assert blocks.rows_at_a_time(0, 7) == 1
