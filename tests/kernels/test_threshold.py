import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_kernels import (
    batch_topk,
    blocks,
    encode_batch_topk,
    encode_threshold,
    encode_topk,
    encode_triton,
    product,
    select_triton,
)
from sae_kernels import threshold as threshold_module
from tests.kernels import hard_rows

HARD = [
    hard_rows.distinct,
    hard_rows.integers,
    hard_rows.equal,
    hard_rows.negative,
    hard_rows.nan_and_inf,
    hard_rows.all_nan,
    hard_rows.zeros_of_both_signs,
]

BACKENDS = ["reference", "torch"]
BATCH, D_IN, D_SAE, K = 13, 7, 104, 5
NAMES = ("x", "enc_rows", "b_enc", "b_in")


@pytest.fixture
def tensors(normal):
    """x, enc_rows, b_enc, b_in in float64."""
    shapes = ((BATCH, D_IN), (D_SAE, D_IN), (D_SAE,), (D_IN,))
    return tuple(normal(*s, seed=i, dtype=torch.float64) for i, s in enumerate(shapes, 1))


@pytest.fixture
def threshold(normal):
    """One threshold per latent; some let half of the rows pass, some none."""
    return normal(D_SAE, seed=9, dtype=torch.float64) * 3.0


def dense_pre(tensors):
    x, enc_rows, b_enc, b_in = tensors
    return (x - b_in) @ enc_rows.T + b_enc


def to_dense(csr, d_sae):
    """Write the entries out one by one."""
    dense = torch.zeros(len(csr.row_ptr) - 1, d_sae, dtype=csr.values.dtype)
    for n in range(len(dense)):
        for e in range(int(csr.row_ptr[n]), int(csr.row_ptr[n + 1])):
            dense[n, csr.indices[e]] = csr.values[e]
    return dense


def passed(tensors, threshold, backend=None):
    x, enc_rows, b_enc, b_in = tensors
    return encode_threshold(x, enc_rows, b_enc, threshold, b_in=b_in, backend=backend)


def best(tensors, k, backend=None, relu=True):
    x, enc_rows, b_enc, b_in = tensors
    return encode_batch_topk(x, enc_rows, b_enc, k, b_in=b_in, relu=relu, backend=backend)


def gradients(function, tensors):
    """Differentiate a sum whose weight of each entry depends on its row and latent."""
    inputs = [t.clone().requires_grad_() for t in tensors]
    csr = function(inputs)
    rows = torch.arange(BATCH).repeat_interleave(csr.row_ptr.diff())
    weights = torch.sin(1.0 + rows * 7.0 + csr.indices)
    return torch.autograd.grad((csr.values * weights).sum(), inputs)


def dense_gradients(mask, tensors, relu):
    inputs = [t.clone().requires_grad_() for t in tensors]
    pre = dense_pre(inputs)
    pre = pre.relu() if relu else pre
    weights = torch.sin(1.0 + torch.arange(BATCH)[:, None] * 7.0 + torch.arange(D_SAE))
    return torch.autograd.grad((pre * weights)[mask].sum(), inputs)


def oracle(pre, k):
    """Name what BatchTopK keeps, by Python's stable sort of the whole batch."""
    flat = [-math.inf if math.isnan(v) else -v for v in pre.double().flatten().tolist()]
    nan = [0 if math.isnan(v) else 1 for v in pre.double().flatten().tolist()]
    order = sorted(range(len(flat)), key=lambda i: (nan[i], flat[i], i))
    return sorted(order[: k * len(pre)])


def places(csr, d_sae):
    rows = torch.arange(len(csr.row_ptr) - 1).repeat_interleave(csr.row_ptr.diff())
    return (rows * d_sae + csr.indices).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answer(backend):
    enc_rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    csr = encode_threshold(
        torch.tensor([[3.0, 2.0], [0.0, 0.0], [1.0, 5.0]]),
        enc_rows,
        torch.tensor([0.5, 0.0, -1.0]),
        torch.tensor([2.0, 1.5, 2.5]),
        b_in=torch.tensor([1.0, 1.0]),
        backend=backend,
    )
    assert csr.row_ptr.tolist() == [0, 1, 1, 3]  # row 0 has 2 at latent 2, which is not above 2.5
    assert csr.indices.tolist() == [0, 1, 2]
    assert csr.values.tolist() == [2.5, 4.0, 3.0]
    assert {csr.indices.dtype, csr.row_ptr.dtype} == {torch.int64}


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_definition(backend, scalar, tensors, threshold):
    limit = 1.25 if scalar else threshold
    csr, pre = passed(tensors, limit, backend), dense_pre(tensors)
    expected = pre * (pre > limit)
    assert 0 < len(csr.values) < pre.numel()
    assert torch.equal(to_dense(csr, D_SAE) != 0, expected != 0)
    assert (to_dense(csr, D_SAE) - expected).abs().max() < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_at_its_threshold_does_not_pass(backend):
    x, rows, zero = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [1.0]]), torch.zeros(3)
    for limit in (1.0, torch.tensor(1.0), torch.tensor([1.0, 1.0, 0.0])):
        csr = encode_threshold(x, rows, zero, limit, backend=backend)
        assert csr.indices.tolist() == ([1, 2] if torch.is_tensor(limit) and limit.dim() else [1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_passes_and_is_shown(backend, tensors):
    x = tensors[0].clone()
    x[3, 2] = torch.nan
    csr = passed((x, *tensors[1:]), 1e9, backend)
    assert csr.row_ptr.tolist() == [0] * 4 + [D_SAE] * (BATCH - 3)
    assert csr.values.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_dense_autograd(backend, tensors, threshold):
    ours = gradients(lambda t: passed(t, threshold, backend), tensors)
    theirs = dense_gradients(dense_pre(tensors) > threshold, tensors, relu=False)
    for got, want in zip(ours, theirs, strict=True):
        assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("k", [1, K, 61])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_best_of_a_batch_equal_the_definition(backend, k, relu, tensors):
    csr, pre = best(tensors, k, backend, relu), dense_pre(tensors)
    oracle_rows = oracle(pre, k)
    assert places(csr, D_SAE) == oracle_rows
    expected = pre.flatten()[oracle_rows]
    assert (csr.values - (expected.relu() if relu else expected)).abs().max() < 1e-13
    assert relu or k < 61 or (csr.values < 0).any()
    mask = torch.zeros(BATCH * D_SAE, dtype=torch.bool)
    mask[oracle_rows] = True
    ours = gradients(lambda t: best(t, k, backend, relu), tensors)
    theirs = dense_gradients(mask.view(BATCH, D_SAE), tensors, relu)
    for got, want in zip(ours, theirs, strict=True):
        assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize(("function", "limit"), [(passed, 1.5), (best, 5)])
def test_chunks_change_nothing(function, limit, tensors, monkeypatch):
    whole = function(tensors, limit)
    for rows in (1, 3, 5):
        monkeypatch.setattr(product, "WORKSPACE_BYTES", rows * D_SAE * 8)
        parts = function(tensors, limit)
        assert torch.equal(parts.indices, whole.indices)
        assert torch.equal(parts.row_ptr, whole.row_ptr)
        assert (parts.values - whole.values).abs().max() <= 1e-13


@pytest.mark.parametrize(("function", "limit"), [(passed, 5.0), (passed, 1e9), (best, 5)])
def test_the_pre_activations_are_never_held_at_once(function, limit, normal, monkeypatch, largest):
    batch, d_in, d_sae = 499, 5, 1024
    monkeypatch.setattr(product, "WORKSPACE_BYTES", 32 * d_sae * 4)
    inputs = [normal(batch, d_in), normal(d_sae, d_in), normal(d_sae), normal(d_in)]
    with largest:
        csr = function([t.requires_grad_() for t in inputs], limit)
        csr.values.sum().backward()
    assert largest.seen <= 4 * 32 * d_sae < batch * d_sae / 3


VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3.5, math.inf, -math.inf, math.nan])


@settings(max_examples=60)
@given(data=st.data(), batch=st.integers(1, 7), d_sae=st.sampled_from([1, 8, 13, 16, 24]))
def test_ties_and_extremes_follow_the_rule(data, batch, d_sae):
    row = st.lists(VALUES, min_size=d_sae, max_size=d_sae)
    pre = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    k = data.draw(st.integers(1, d_sae))
    for backend in BACKENDS:
        csr = batch_topk(pre, k, relu=False, backend=backend)
        assert places(csr, d_sae) == oracle(pre, k)
        torch.testing.assert_close(
            csr.values, pre.flatten()[oracle(pre, k)], rtol=0, atol=0, equal_nan=True
        )


@settings(max_examples=40)
@given(data=st.data(), batch=st.integers(1, 7), k=st.integers(1, 5))
def test_ties_across_chunks_follow_the_rule(data, batch, k):
    row = st.lists(VALUES.filter(math.isfinite), min_size=1, max_size=1)
    x = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    x[data.draw(st.integers(0, batch - 1))] = data.draw(VALUES)
    enc_rows = torch.tensor([[1.0], [1.0], [-1.0], [2.0], [0.5]])
    pre = x @ enc_rows.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "WORKSPACE_BYTES", 2 * 5 * 4)
        csr = encode_batch_topk(x, enc_rows, torch.zeros(5), k, relu=False)
    assert places(csr, 5) == oracle(pre, k)


def test_batch_topk_carries_gradients_to_the_winners_alone():
    pre = torch.tensor([[1.0, 5.0, -2.0], [0.5, 4.0, 3.0]], requires_grad=True)
    csr = batch_topk(pre, 2)
    assert (csr.row_ptr.tolist(), csr.indices.tolist()) == ([0, 2, 4], [0, 1, 1, 2])
    (csr.values * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert pre.grad is not None
    assert pre.grad.tolist() == [[1.0, 2.0, 0.0], [0.0, 3.0, 4.0]]
    assert not any(t.requires_grad for t in csr[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_equal_rows_of_one_k_it_is_topk(backend, tensors):
    """A batch of one row keeps the same latents as `encode_topk`."""
    x, enc_rows, b_enc, b_in = tensors
    csr = encode_batch_topk(x[:1], enc_rows, b_enc, K, b_in=b_in, backend=backend)
    topk = encode_topk(x[:1], enc_rows, b_enc, K, b_in=b_in, backend=backend)
    assert torch.equal(csr.indices, topk.indices[0])
    assert torch.equal(csr.values, topk.values[0])


@pytest.mark.parametrize("function", [passed, best])
def test_values_alone_have_gradients(function, tensors, threshold):
    threshold.requires_grad_()
    limit = threshold if function is passed else 5
    csr = function([t.requires_grad_() for t in tensors], limit)
    assert csr.values.requires_grad
    assert not any(t.requires_grad for t in csr[1:])
    (gradient,) = torch.autograd.grad(csr.values.square().sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    assert threshold.grad is None


@pytest.mark.parametrize("asked", NAMES)
def test_only_what_is_needed_gets_a_gradient(asked, tensors):
    everything = gradients(lambda t: passed(t, 0.5), tensors)
    inputs = [t.clone().requires_grad_(n == asked) for n, t in zip(NAMES, tensors, strict=True)]
    csr = passed(inputs, 0.5)
    rows = torch.arange(BATCH).repeat_interleave(csr.row_ptr.diff())
    (csr.values * torch.sin(1.0 + rows * 7.0 + csr.indices)).sum().backward()
    for tensor, name, full in zip(inputs, NAMES, everything, strict=True):
        assert (tensor.grad is not None) == (name == asked)
        if tensor.grad is not None:
            assert torch.equal(tensor.grad, full)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_entries(backend, tensors):
    inputs = [t.clone().requires_grad_() for t in tensors]
    for csr in (
        passed((inputs[0][:0], *inputs[1:]), 0.0, backend),
        passed(inputs, 1e9, backend),
        best((inputs[0][:0], *inputs[1:]), 3, backend),
    ):
        assert len(csr.values) == len(csr.indices) == 0
        assert csr.row_ptr.tolist() == [0] * len(csr.row_ptr)
        csr.values.sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() == 0 for t in inputs[1:])


def test_parameters_of_16_bits_and_autocast_give_float32(tensors):
    low = [t.bfloat16().requires_grad_() for t in tensors]
    csr = passed(low, 0.5)
    assert csr.values.dtype == torch.float32
    assert {g.dtype for g in torch.autograd.grad(csr.values.sum(), low)} == {torch.bfloat16}
    single = [t.float() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        inside = best(single, K)
    assert inside.values.dtype == torch.float32
    assert not torch.equal(inside.values, best(single, K).values)


def test_bad_arguments_are_refused(shipped, tensors, threshold):
    x, enc_rows, b_enc, b_in = tensors
    bare = shipped(encode_threshold)
    with pytest.raises(ValueError, match=r"threshold must have the shape \(104\), got \(103,\)"):
        bare(x, enc_rows, b_enc, threshold[1:])
    with pytest.raises(ValueError, match=r"x must have the shape \(any, 7\), got \(13, 6\)"):
        bare(x[:, :6], enc_rows, b_enc, 0.0)
    with pytest.raises(ValueError, match="backend must be one of"):
        bare(x, enc_rows, b_enc, 0.0, backend="fast")
    bare = shipped(encode_batch_topk)
    with pytest.raises(ValueError, match="k must lie between 1 and d_sae=104, got 105"):
        bare(x, enc_rows, b_enc, 105)
    with pytest.raises(TypeError, match="b_in must have the dtype of x"):
        bare(x, enc_rows, b_enc, K, b_in=b_in.float())
    with pytest.raises(ValueError, match=r"pre must have the shape \(any, any\), got \(104,\)"):
        shipped(batch_topk)(b_enc, 1)


@pytest.mark.parametrize("make", HARD)
@pytest.mark.parametrize("k", [1, 4, 29])
def test_the_path_of_a_gpu_selects_the_same_and_waits_for_nothing(make, k, normal, monkeypatch):
    pre = make(normal(7, 117, dtype=torch.float64)).float()
    expected = batch_topk(pre, k, backend="reference")
    monkeypatch.setattr(encode_triton, "_multiply", lambda operands, out: out.copy_(operands.x))
    monkeypatch.setattr(blocks, "WORKSPACE_BYTES", 3 * 117 * 4)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)  # whose shape the host would wait for
    monkeypatch.setattr(torch.Tensor, "item", None)
    whole = product.Product(pre, torch.zeros(117, 117), torch.zeros(117))
    rows = threshold_module._keep_batch_topk(whole, k, True, "triton")
    for got, want in zip(rows, expected, strict=True):
        assert torch.equal(got.nan_to_num(7e30), want.nan_to_num(7e30))


@pytest.mark.parametrize("make", HARD)
@pytest.mark.parametrize("limit", [0.25, -math.inf, math.nan])
def test_the_path_of_a_gpu_lets_the_same_pass(make, limit, normal, monkeypatch):
    pre = make(normal(7, 117, dtype=torch.float64)).float()
    limit = torch.where(torch.arange(117) % 5 > 0, normal(117).abs(), limit)
    monkeypatch.setattr(encode_triton, "_multiply", lambda operands, out: out.copy_(operands.x))
    monkeypatch.setattr(blocks, "WORKSPACE_BYTES", 3 * 117 * 4)
    whole = product.Product(pre, torch.zeros(117, 117), torch.zeros(117))
    rows = threshold_module._keep_passing(whole, limit, "triton")
    expected = threshold_module._csr(pre, threshold_module._passing(pre, limit), False)
    for got, want in zip(rows, expected, strict=True):
        assert torch.equal(got.nan_to_num(7e30), want.nan_to_num(7e30))


def test_the_path_of_a_gpu_takes_groups_where_they_pay_and_rows_end_in_short_ones(normal):
    pre = normal(5, 1003)
    assert blocks.batch_group_size(pre.numel(), 10) == 16
    source = select_triton.source_of(pre)
    best = select_triton.best_of_batch(source, select_triton.group_maxima(source, 16), 16, 10)
    assert torch.equal(best[1], pre.flatten().topk(10).indices.sort().values)
    assert torch.equal(best[0], pre.flatten()[best[1]])
    assert blocks.batch_group_size(40, 10) == 1
