"""The encoder's kernels in Triton's interpreter, against float64 and the rule for ties."""

import math
from functools import partial

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from sae_kernels import batch_topk, blocks, encode_triton, topk_select
from sae_kernels.encode_triton import Gate, Operands, encode_topk, gated_product
from sae_kernels.select_triton import group_maxima, keys_of, source_of
from tests.kernels import hard_rows

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


@pytest.fixture
def unwritten():
    """Memory that nobody wrote to is NaN, which comes out wherever it is read."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def assert_encodes(operands, k, oracle, gated=None):
    pre = right_product(operands)
    best = oracle(pre, k)
    values, indices = encode_topk(*operands, k, False, gated)
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int64)
    assert torch.equal(indices, best.sort(1).values)
    assert torch.equal(values.double(), pre.gather(1, indices))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1031, 3), (5, 1024, 23), (17, 1153, 37)], ids=str)
def test_encodes_by_either_way(shape, dtype, drawn, oracle, small_tiles, unwritten, monkeypatch):
    taken = []
    true = encode_triton.gated_product
    monkeypatch.setattr(
        encode_triton, "gated_product", lambda *a: (taken.append("gated"), true(*a))[1]
    )
    operands = drawn(*shape, dtype)
    assert_encodes(operands, 3, oracle)
    assert taken == [], "nobody takes it before a GPU has run it"
    assert_encodes(operands, 3, oracle, gated=True)
    assert taken == ["gated"]
    monkeypatch.setattr(blocks, "GATED_WIDTH", shape[2])
    assert_encodes(operands, 3, oracle)
    assert taken == ["gated"] * (1 if dtype == torch.float32 else 2)
    monkeypatch.setattr(blocks, "GATED_WIDTH", shape[2] - 1)
    assert_encodes(operands, 3, oracle)
    assert_encodes(operands, 29, oracle, gated=True)  # more than the first groups are
    assert len(taken) <= 2


def test_encodes_with_the_tiles_of_a_gpu(drawn, oracle, unwritten):
    for gated in (False, True):
        assert_encodes(drawn(3, 2311, 67, torch.float16), 3, oracle, gated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 1), (17, 131, 23), (37, 64, 16)], ids=str)
@pytest.mark.parametrize("size", [8, 32])
def test_the_product_and_its_maxima_agree(shape, dtype, size, drawn, normal, error, small_tiles):
    operands = drawn(*shape, dtype)
    operands = operands._replace(x=normal(*operands.x.shape, seed=3, dtype=dtype))
    pre = torch.empty(shape[0], shape[1])
    no_bound = Gate(size, 0, lambda _: torch.tensor(-(1 << 31), dtype=torch.int32))
    maxima = gated_product(operands, pre, no_bound)
    assert error(pre, right_product(operands)) < 1e-6
    assert torch.equal(maxima, group_maxima(source_of(pre), size))


@pytest.mark.parametrize("bounds", ["one", "by row", "by group"])
def test_a_group_is_stored_where_its_maximum_is_not_below_its_bound(bounds, drawn, small_tiles):
    operands = drawn(5, 131, 19)
    right = right_product(operands).float()
    all_maxima = group_maxima(source_of(right), 8)
    bound = {
        "one": all_maxima.median(),
        "by row": all_maxima.median(1, keepdim=True).values,
        "by group": all_maxima.median(0).values,
    }[bounds]
    pre = torch.full_like(right, -7e30)
    maxima = gated_product(operands, pre, Gate(8, 64, lambda found: bound.to(found.dtype)))
    assert torch.equal(maxima, all_maxima)
    stored = all_maxima >= bound
    stored[:, : 64 // 8] = True
    assert 0.2 < stored[:, 8:].float().mean() < 0.9
    stored = stored.repeat_interleave(8, dim=1)[:, :131]
    assert torch.equal(pre, right.where(stored, torch.tensor(-7e30)))


def rising(v):
    return v.sort(1).values


def falling(v):
    return v.sort(1, descending=True).values


def few_positive(v):
    return 3 * (v - 2.5).relu() - 1


HARD = [
    hard_rows.distinct, hard_rows.integers, hard_rows.equal, hard_rows.negative,
    hard_rows.nan_and_inf, hard_rows.all_nan, hard_rows.zeros_of_both_signs,
    rising, falling, few_positive,
]  # fmt: skip


@pytest.fixture
def outer(normal):
    """Operands whose product is a row that `make` makes, its negative, and half of it."""

    def draw(make, d_sae=1031):
        row = make(normal(1, d_sae)).float()
        return Operands(torch.tensor([[1.0], [-1.0], [0.5]]), row.T.contiguous(), row[0] * 0)

    return draw


def same(ours, right):
    for one, other in zip(ours, right, strict=True):
        assert torch.equal(one.nan_to_num(7e30), other.nan_to_num(7e30))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("make", HARD)
def test_the_gate_changes_no_result(make, outer, small_tiles, unwritten, monkeypatch):
    operands = outer(make)._replace(bias=torch.zeros(1031))
    pre = right_product(operands).float()
    calls = []
    true = encode_triton.gated_product
    monkeypatch.setattr(encode_triton, "gated_product", lambda *a: (calls.append(1), true(*a))[1])
    for k, relu in ((1, False), (4, True)):
        right = topk_select(pre, k, relu=relu, backend="reference")
        same(encode_topk(*operands, k, relu, gated=True), right)
    for n_rows in (3, 1):
        monkeypatch.setattr(blocks, "WORKSPACE_BYTES", n_rows * 1031 * 4)
        for k in (1, 4):
            right = batch_topk(pre, k, relu=False, backend="reference")
            values, places = encode_triton.encode_batch_topk(operands, 3 * k, gated=True)
            rows = torch.arange(3).repeat_interleave(right.row_ptr.diff())
            same((values, places), (right.values, rows * 1031 + right.indices))
        for limit in (0.5, -math.inf, math.inf, math.nan):
            right = (~(pre <= limit)).flatten().nonzero().squeeze(1)
            ours = encode_triton.encode_threshold(operands, torch.tensor(limit), gated=True)
            same(ours, (pre.flatten()[right], right))
    assert len(calls) == 2 + (1 + 3) + (1 + 2) + 4 * (1 + 3)


@pytest.mark.parametrize("gated", [False, True])
def test_each_latent_has_its_threshold(gated, drawn, normal, small_tiles, unwritten):
    operands = drawn(7, 1031, 19)
    threshold = (4 * normal(1031, seed=5)).round() + 9
    threshold[[3, 500, 1030]] = torch.tensor([math.nan, math.inf, -math.inf])
    pre = right_product(operands).float()
    right = (~(pre <= threshold)).flatten().nonzero().squeeze(1)
    assert 100 < len(right) < 3000
    same(encode_triton.encode_threshold(operands, threshold, gated), (pre.flatten()[right], right))


def test_of_later_chunks_only_what_can_come_in_is_stored(drawn, small_tiles, monkeypatch):
    operands = drawn(6, 1031, 19)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)  # whose shape the host would wait for
    monkeypatch.setattr(torch.Tensor, "item", None)
    monkeypatch.setattr(blocks, "WORKSPACE_BYTES", 2 * 1031 * 4)
    firsts, true = [], encode_triton._store
    monkeypatch.setattr(encode_triton, "_store", lambda *a: (firsts.append(a[4]), true(*a))[1])
    encode_triton.encode_batch_topk(operands, 6, gated=True)
    assert firsts == [(0, 128), (128, 1031), (0, 1031), (0, 1031)]


def test_offsets_past_int32(small_tiles, monkeypatch):
    """The last latents of the last row lie more than 2^31 numbers behind the first one.

    Only their memory is touched: the interpreter works where a tensor lies, and would copy it back,
    and what is not set would be filled, as algorithms are deterministic here.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    d_sae, size = (1 << 29) + 128, 64
    rows, pre = torch.empty(d_sae, 1, dtype=torch.float16), torch.empty(5, d_sae)
    maxima = torch.empty(5, d_sae // size, dtype=torch.int32)
    operands = Operands(torch.arange(5.0)[:, None].half(), rows, torch.empty(d_sae))
    rows[-128:] = torch.arange(-58.0, 70.0)[:, None]
    operands.bias[-128:] = 0.0
    right = torch.arange(5.0)[:, None] * rows[-128:, 0].float()
    largest = right.unflatten(1, (2, size)).amax(2)
    ten = keys_of(torch.tensor(10.0)).expand(maxima.shape)
    for bounds, stored in ((None, largest > -1), (ten, largest >= 10)):
        pre[:, -128:] = -7.0
        encode_triton._store(operands, pre, maxima, size, (d_sae - 128, d_sae), bounds)
        wanted = right.where(stored.repeat_interleave(size, 1), torch.tensor(-7.0))
        assert torch.equal(pre[:, -128:], wanted)
        assert torch.equal(maxima[:, -2:], keys_of(largest))


@pytest.mark.parametrize("gated", [False, True])
def test_chunks_of_rows_change_nothing(gated, drawn, small_tiles, monkeypatch):
    operands = drawn(5, 1031, 19, torch.float16)
    whole = encode_topk(*operands, 3, True, gated)
    for n_rows in (1, 2):
        monkeypatch.setattr(blocks, "WORKSPACE_BYTES", n_rows * 1031 * 4)
        parts = encode_topk(*operands, 3, True, gated)
        assert torch.equal(parts[0], whole[0])
        assert torch.equal(parts[1], whole[1])


def test_the_workspace_is_bounded(drawn, small_tiles, monkeypatch):
    seen = []
    true = encode_triton._multiply
    monkeypatch.setattr(
        encode_triton, "_multiply", lambda o, pre: (seen.append(pre), true(o, pre))[1]
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
        x, rows = normal(5, 23, dtype=dtype), normal(1031, 23, seed=1, dtype=dtype)
        run = partial(encode_topk, x, rows, normal(1031, seed=2), 3, True, gated=True)
        first, again = run(), run()
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_no_rows(drawn):
    values, indices = encode_topk(*drawn(0, 23, 5), 3, True)
    assert values.shape == indices.shape == (0, 3)


def test_more_than_a_program_can_hold_is_sorted(drawn, oracle, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_K", 6)
    for dtype in (torch.float32, torch.float16):
        assert_encodes(drawn(3, 131, 5, dtype), 7, oracle)


def test_no_product_is_gated_before_a_gpu_has_run_it(monkeypatch):
    assert not blocks.gates(768, 2)
    monkeypatch.setattr(blocks, "GATED_WIDTH", 1536)
    assert [blocks.gates(width, 2) for width in (768, 1536, 2304)] == [True, True, False]
    assert not blocks.gates(768, 4)


@pytest.mark.parametrize(
    ("d_sae", "k", "first"),
    [(131072, 32, 16384), (24576, 32, 3072), (65536, 64, 8192), (131072, 64, 16384),
     (4096, 25, 0), (1 << 24, 64, 1 << 20), (1031, 3, 128)],
)  # fmt: skip
def test_an_eighth_comes_first_where_it_bounds_the_others(d_sae, k, first):
    size = blocks.group_size(d_sae, k) or 8
    assert blocks.first_latents(d_sae, size, k) == first
    assert first % size == 0


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
