"""The decoding kernels in Triton's interpreter, against float64."""

import math

import pytest
import torch

from sae_kernels import blocks, decode_triton
from sae_kernels.decode_triton import (
    csr_row_products,
    csr_weighted_rows,
    decode_mse,
    row_products,
    weighted_rows,
)

# Relative errors. The interpreter truncates to bfloat16, so its tolerance is wide.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCES)
SHAPES = [(1, 1, 1, 2), (3, 7, 13, 23), (2, 61, 547, 67), (2, 19, 53, 521), (5, 3, 11, 257)]
"""Batch, k, d_sae, d_out."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weighted_rows(shape, dtype, sparse, normal, error):
    batch, k, d_sae, d_out = shape
    values, indices = sparse(batch, k, d_sae)
    table = normal(d_sae, d_out, dtype=dtype)
    out = weighted_rows(values, indices, table)
    assert out.dtype == dtype
    right = (values.double()[:, :, None] * table.double()[indices]).sum(1)
    assert error(out, right) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_products(shape, dtype, sparse, normal, error):
    batch, k, d_sae, d_out = shape
    indices = sparse(batch, k, d_sae).indices
    grad, table = normal(batch, d_out, seed=3, dtype=dtype), normal(d_sae, d_out, dtype=dtype)
    out = row_products(grad, table, indices)
    assert out.dtype == torch.float32
    right = torch.einsum("nd,nkd->nk", grad.double(), table.double()[indices])
    assert error(out, right) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 257, 269, 31)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_decode_mse(shape, dtype, with_bias, sparse, normal, error):
    batch, k, d_sae, d_out = shape
    values, indices = sparse(batch, k, d_sae)
    table, bias = normal(d_sae, d_out, dtype=dtype), normal(d_out, seed=4, dtype=dtype)
    target = normal(batch, d_out, seed=5, dtype=dtype)
    result = decode_mse(values, indices, table, bias if with_bias else None, target, 0.375)

    z = values.double().requires_grad_()
    x_hat = (z[:, :, None] * table.double()[indices]).sum(1) + (bias.double() if with_bias else 0)
    x_hat.retain_grad()
    row_loss = (x_hat - target.double()).square().sum(1)
    (0.375 * row_loss.sum()).backward()
    assert [out.dtype for out in result] == [dtype, torch.float32, dtype, torch.float32]
    for out, right in zip(result, (x_hat, row_loss, x_hat.grad, z.grad), strict=True):
        exact = out.dtype == torch.float32
        assert error(out, right.detach()) < (2e-6 if exact else TOLERANCES[dtype])


def test_a_wide_k_takes_the_unfused_way(sparse, normal, monkeypatch, error):
    values, indices = sparse(2, 7, 13)
    arguments = (values, indices, normal(13, 23), normal(23, seed=4), normal(2, 23, seed=5), 0.5)
    fused = decode_mse(*arguments)
    monkeypatch.setattr(blocks, "MAX_FUSED_K", 6)
    monkeypatch.setattr(decode_triton, "_decode_mse_kernel", None)
    for one, other in zip(fused, decode_mse(*arguments), strict=True):
        assert error(one, other.double()) < 1e-6


@pytest.mark.parametrize("wide", [torch.int32, torch.int64])
def test_csr_agrees_with_float64_for_rows_of_any_length(wide, normal, error):
    lengths = [0, 1, 61, 0, 7, 16, 0]
    row_ptr = torch.tensor([0, *lengths]).cumsum(0).to(wide)
    nnz = sum(lengths)
    indices = torch.randint(53, (nnz,), generator=torch.Generator().manual_seed(6)).to(wide)
    values, table, grad = normal(nnz, seed=2), normal(53, 29), normal(7, 29, seed=3)
    row = torch.arange(7).repeat_interleave(torch.tensor(lengths))
    entries = values.double()[:, None] * table.double()[indices.long()]
    right = torch.zeros(7, 29, dtype=torch.float64).index_add_(0, row, entries)
    out = csr_weighted_rows(values, indices, row_ptr, table)
    assert error(out, right) < 1e-6
    assert (out[[0, 3, 6]] == 0).all()
    right = (grad.double()[row] * table.double()[indices.long()]).sum(1)
    assert error(csr_row_products(grad, table, indices, row_ptr), right) < 1e-6


def test_csr_without_entries(normal):
    none, row_ptr = torch.empty(0, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    out = csr_weighted_rows(none.float(), none, row_ptr, normal(13, 23))
    assert torch.equal(out, torch.zeros(3, 23))
    assert csr_row_products(normal(3, 23), normal(13, 23), none, row_ptr).shape == (0,)


def test_an_index_may_repeat_and_padding_adds_nothing(normal):
    table = normal(13, 23)
    values = torch.tensor([[2.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    indices = torch.tensor([[5, 5, 0], [0, 0, 0]])
    out = weighted_rows(values, indices, table)
    assert torch.allclose(out[0], 5 * table[5], rtol=1e-6)
    assert (out[1] == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy on inf * 0
def test_a_nan_stays_in_its_row(sparse, normal):
    values, indices = sparse(3, 7, 13)
    values[1, 2] = math.nan
    out = weighted_rows(values, indices, normal(13, 23))
    assert out.isnan().any(1).tolist() == [False, True, False]
    target = normal(3, 23, seed=5)
    target[2, 3] = math.inf
    x_hat, row_loss, grad, d_values = decode_mse(
        values.nan_to_num(), indices, normal(13, 23), None, target, 1.0
    )
    assert x_hat.isfinite().all()
    assert row_loss.tolist()[2] == math.inf
    assert (~grad.isfinite()).nonzero().tolist() == [[2, 3]]
    assert d_values[:2].isfinite().all()
    assert not d_values[2].isfinite().any()


def test_no_rows(normal):
    none = torch.empty(0, 7)
    table = normal(13, 23)
    assert weighted_rows(none, none.long(), table).shape == (0, 23)
    assert row_products(torch.empty(0, 23), table, none.long()).shape == (0, 7)
    result = decode_mse(none, none.long(), table, None, torch.empty(0, 23), 1.0)
    assert [tuple(out.shape) for out in result] == [(0, 23), (0,), (0, 23), (0, 7)]


def test_int32_indices_and_repeated_runs_give_the_same_bits(sparse, normal):
    values, indices = sparse(3, 19, 67)
    table, grad = normal(67, 263), normal(3, 263, seed=3)
    for again in (indices, indices.int()):
        assert torch.equal(
            weighted_rows(values, indices, table), weighted_rows(values, again, table)
        )
        assert torch.equal(row_products(grad, table, indices), row_products(grad, table, again))
        pairs = zip(
            decode_mse(values, indices, table, None, grad, 0.1),
            decode_mse(values, again, table, None, grad, 0.1),
            strict=True,
        )
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("width", [1, 64, 257, 768, 1000, 2304, 4096])
@pytest.mark.parametrize("k", [1, 32, 100, 256])
def test_tiles_are_powers_of_two_that_stay_in_registers(width, k):
    for block in (
        blocks.weighted_rows(width),
        blocks.row_products(width, k),
        blocks.decode_mse(width, k),
    ):
        for size in (block.entries, block.width, block.warps):
            assert size == blocks.next_pow2(size)
        assert block.entries * block.width <= 64 * blocks.WARP * block.warps
    assert blocks.decode_mse(width, k).entries >= k


def test_rows_of_real_models_are_read_without_padding():
    assert all(width % blocks.weighted_rows(width).width == 0 for width in (768, 2304, 4096, 5120))
