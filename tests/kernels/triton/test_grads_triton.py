"""The kernels of the weights' gradients in Triton's interpreter, against float64."""

import pytest
import torch

from sae_kernels import blocks, grads_triton
from sae_kernels.grads_triton import weight_grads
from sae_kernels.launch import Entries

TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}
"""Relative errors. Sums are float32 and interpreted rows are upcast, so the inputs are exact."""
SHAPES = [(1, 1, 1, 1), (5, 3, 11, 23), (31, 7, 13, 67), (61, 5, 547, 37), (2, 61, 61, 5)]
"""Batch, k, d_sae, width: runs of 1 to 31 entries, also over the edges of blocks."""


def segment_product(indices, weights, rows, d_sae):
    parts = Entries(indices, d_sae).segments
    return grads_triton.segment_product(parts, weights.flatten(), rows)


def right_product(indices, weights, rows, d_sae):
    """The definition in float64."""
    out = torch.zeros(d_sae, rows.shape[1], dtype=torch.float64)
    entries = weights.double()[:, :, None] * rows.double()[:, None, :]
    return out.index_add_(0, indices.flatten().long(), entries.flatten(0, 1))


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_segment_product(shape, dtype, sparse, normal, error):
    batch, k, d_sae, width = shape
    weights, indices = sparse(batch, k, d_sae)
    rows = normal(batch, width, seed=3, dtype=dtype)
    out = segment_product(indices, weights, rows, d_sae)
    assert out.dtype == torch.float32
    assert error(out, right_product(indices, weights, rows, d_sae)) < TOLERANCES[dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squares_are_those_of_the_product(shape, sparse, normal):
    batch, k, d_sae, width = shape
    weights, indices = sparse(batch, k, d_sae)
    parts = Entries(indices, d_sae).segments
    rows = normal(batch, width, seed=3)
    out, square = grads_triton.product_and_square(parts, weights.flatten(), rows)
    assert torch.equal(out, segment_product(indices, weights, rows, d_sae))
    assert float(square) == pytest.approx(float(out.double().square().sum()), rel=1e-6)
    rows[0, -1] = torch.nan
    bad = grads_triton.product_and_square(parts, weights.flatten(), rows)[1]
    assert bool(bad.isnan()), "a gradient that is no number has no norm"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_grads(shape, sparse, normal, error):
    batch, k, d_sae, d_in = shape
    values, indices = sparse(batch, k, d_sae)
    values[:, 0] = 0.0
    d_values = normal(batch, k, seed=3)
    grad_out, x = normal(batch, 29, seed=4), normal(batch, d_in, seed=5)
    dec_rows, enc_rows, b_enc, n_fired = weight_grads(values, d_values, indices, grad_out, x, d_sae)
    if k > 1:
        assert error(dec_rows, right_product(indices, values, grad_out, d_sae)) < 1e-6
    assert error(enc_rows, right_product(indices, d_values, x, d_sae)) < 1e-6
    ones = torch.ones(batch, 1)
    assert error(b_enc[:, None], right_product(indices, d_values, ones, d_sae)) < 1e-6
    fired = right_product(indices, (values != 0).double(), ones, d_sae)
    assert n_fired.dtype == torch.int64
    assert torch.equal(n_fired.double(), fired[:, 0])


@pytest.mark.parametrize(
    "hot",
    [
        {3: 200},
        {0: 64, 12: 192},
        {0: 63, 1: 2, 2: 63, 5: 128},
        {1: 1, 2: 127, 3: 64, 4: 64},
        {12: 257},
        {0: 30, 4: 34, 6: 64, 7: 1},
    ],
    ids=str,
)
def test_runs_over_and_along_the_edges_of_blocks(hot, normal, error):
    """The latents of `hot` have so many entries, the other latents of 13 none."""
    order = torch.Generator().manual_seed(7)
    latents = torch.cat([torch.full((count,), latent) for latent, count in hot.items()])
    indices = latents[torch.randperm(len(latents), generator=order)][:, None]
    weights, rows = normal(len(latents), 1, seed=2), normal(len(latents), 19, seed=3)
    out = segment_product(indices, weights, rows, 13)
    assert error(out, right_product(indices, weights, rows, 13)) < 1e-6
    cold = [latent for latent in range(13) if latent not in hot]
    assert (out[cold] == 0).all()


def test_wide_rows_take_several_slabs(sparse, normal, error, monkeypatch):
    monkeypatch.setattr(blocks, "FINISH_WIDTH", 64)
    weights, indices = sparse(67, 2, 3)  # every latent crosses an edge or has most of a block
    rows = normal(67, 173, seed=3)
    right = right_product(indices, weights, rows, 5)
    for splits in (1, 3, 6):
        block = blocks.segments(134, 173, 4, 80)._replace(splits=splits)
        monkeypatch.setattr(blocks, "segments", lambda *_, block=block: block)
        assert error(segment_product(indices, weights, rows, 5), right) < 1e-6


def test_the_sort_is_stable_and_knows_where_runs_start():
    parts = Entries(torch.tensor([[1, 4], [0, 1], [1, 4]]), 6).segments
    assert parts.latents.tolist() == [0, 1, 1, 1, 4, 4]
    assert parts.entries.tolist() == [2, 0, 3, 4, 1, 5]
    assert parts.rows.tolist() == [1, 0, 1, 2, 0, 2]
    assert grads_triton._bounds(parts).tolist() == [0, 1, 4, 4, 4, 6, 6]


def test_an_index_may_repeat_in_a_row(normal, error):
    indices = torch.tensor([[2, 2, 0], [2, 0, 0]])
    weights, rows = normal(2, 3), normal(2, 7, seed=3)
    out = segment_product(indices, weights, rows, 3)
    assert error(out, right_product(indices, weights, rows, 3)) < 1e-6


def test_without_entries_all_is_zero():
    none = torch.empty(0, 3)
    grads = weight_grads(none, none, none.long(), torch.empty(0, 5), torch.empty(0, 7), 11)
    assert [tuple(grad.shape) for grad in grads] == [(11, 5), (11, 7), (11,), (11,)]
    assert all((grad == 0).all() for grad in grads)


def test_int32_indices_and_repeated_runs_give_the_same_bits(sparse, normal):
    weights, indices = sparse(31, 5, 11)
    rows = normal(31, 67, seed=3)
    first = weight_grads(weights, weights, indices, rows, rows, 11)
    again = weight_grads(weights, weights, indices.int(), rows, rows, 11)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert torch.equal(first.dec_rows, first.enc_rows)


def test_small_float16_rows_keep_small_weights(sparse, normal, error):
    weights, indices = sparse(5, 3, 11)
    rows = normal(5, 23, seed=3, dtype=torch.float16)
    out = segment_product(indices, weights * 1e-12, rows, 11)
    assert error(out, right_product(indices, weights * 1e-12, rows, 11)) < 1e-6


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_blocks_share_the_columns_only_where_blocks_are_few(arch):
    assert blocks.segments(1 << 18, 2304, 2, arch).splits == 1
    few = blocks.segments(64 * 100, 2304, 2, arch)
    assert few.splits == 10
    assert blocks.segments(1, 64, 2, arch).splits == 1
