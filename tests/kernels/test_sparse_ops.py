"""encode_topk, sparse_decode, sparse_weight_grads and auxk against dense float64 autograd."""

import pytest
import torch

from sae_kernels import auxk, encode_topk, sparse_decode, sparse_weight_grads, topk_select

BATCH, D_IN, D_OUT, D_SAE, K = 5, 7, 11, 23, 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def operands() -> dict[str, torch.Tensor]:
    return {
        "x": normal(BATCH, D_IN, seed=1),
        "enc_rows": normal(D_SAE, D_IN, seed=2),
        "b_enc": normal(D_SAE, seed=3),
        "b_in": normal(D_IN, seed=4),
        "dec_rows": normal(D_SAE, D_OUT, seed=5),
        "b_dec": normal(D_OUT, seed=6),
    }


def leaves(*names: str, dtype=torch.float64) -> list[torch.Tensor]:
    all_of_them = operands()
    return [all_of_them[name].to(dtype).requires_grad_() for name in names]


def codes(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, one of them 0, and indices with a hot latent and a latent that stands twice."""
    indices = torch.tensor([[0, 4, 9], [4, 4, 22], [1, 4, 7], [4, 7, 8], [0, 0, 4]])
    values = normal(BATCH, K, seed=7).to(dtype)
    values[4, 0] = 0.0
    return values, indices


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_b_in", [True, False])
def test_encode_gradients_of_every_input(relu, with_b_in):
    names = ("x", "enc_rows", "b_enc", "b_in")[: 4 if with_b_in else 3]

    def values(x, enc_rows, b_enc, b_in=None):
        return encode_topk(x, enc_rows, b_enc, K, b_in=b_in, relu=relu).values

    assert torch.autograd.gradcheck(values, leaves(*names))


def test_encode_equals_the_reference_in_value_and_gradient():
    outcomes = []
    for backend in ("torch", "reference"):
        given = leaves("x", "enc_rows", "b_enc", "b_in", dtype=torch.float32)
        found = encode_topk(*given[:3], K, b_in=given[3], backend=backend)
        grads = torch.autograd.grad((found.values * torch.arange(1.0, K + 1)).sum(), given)
        outcomes.append((found, grads))
    (ours, our_grads), (slow, slow_grads) = outcomes
    assert torch.equal(ours.indices, slow.indices)
    torch.testing.assert_close(ours.values, slow.values, rtol=1e-6, atol=1e-6)
    for got, expected in zip(our_grads, slow_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_encode_in_row_chunks_is_the_same(monkeypatch):
    given = leaves("x", "enc_rows", "b_enc")
    whole = encode_topk(*given, K)
    monkeypatch.setattr("sae_kernels.encode.WORKSPACE_BYTES", 2 * D_SAE * 8)
    chunked = encode_topk(*given, K)
    torch.testing.assert_close(whole.values, chunked.values)
    assert torch.equal(whole.indices, chunked.indices)


def test_indices_have_no_gradient_and_there_is_no_second_derivative():
    given = leaves("x", "enc_rows", "b_enc")
    found = encode_topk(*given, K)
    assert not found.indices.requires_grad
    (first,) = torch.autograd.grad(found.values.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_encode_under_autocast_selects_in_fp32_from_a_bf16_product():
    x, enc, bias = (t.detach() for t in leaves("x", "enc_rows", "b_enc", dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encode_topk(x, enc, bias, K)
    pre = (x.bfloat16() @ enc.bfloat16().T).float() + bias
    expected = topk_select(pre, K)
    assert found.values.dtype == torch.float32
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("with_bias", [True, False])
def test_decode_gradients_of_every_input(with_bias):
    values, indices = codes()
    dec_rows, b_dec = leaves("dec_rows", "b_dec")

    def x_hat(values, dec_rows, b_dec=None):
        return sparse_decode(values, indices, dec_rows, b_dec)

    inputs = [values.requires_grad_(), dec_rows] + [b_dec] * with_bias
    assert torch.autograd.gradcheck(x_hat, inputs)


@pytest.mark.parametrize("index_type", [torch.int64, torch.int32])
def test_decode_equals_a_dense_product(index_type):
    values, indices = codes(torch.float32)
    dec_rows, b_dec = (t.detach() for t in leaves("dec_rows", "b_dec", dtype=torch.float32))
    dense = torch.zeros(BATCH, D_SAE).scatter_add(1, indices, values)
    expected = (dense.double() @ dec_rows.double() + b_dec).float()
    for backend in ("torch", "reference"):
        got = sparse_decode(values, indices.to(index_type), dec_rows, b_dec, backend=backend)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    strided = sparse_decode(values.T.contiguous().T, indices, dec_rows.T.contiguous().T, b_dec)
    assert torch.equal(strided, sparse_decode(values, indices, dec_rows, b_dec))


def test_weight_grads_equal_dense_products_and_count_firings():
    values, indices = codes()
    d_values, grad_out, x = normal(BATCH, K, seed=8), normal(BATCH, D_OUT, seed=9), operands()["x"]
    got = sparse_weight_grads(values, d_values, indices, grad_out, x, D_SAE)
    acts = torch.zeros(BATCH, D_SAE).double().scatter_add(1, indices, values)
    d_acts = torch.zeros(BATCH, D_SAE).double().scatter_add(1, indices, d_values)
    torch.testing.assert_close(got.dec_rows, acts.T @ grad_out)
    torch.testing.assert_close(got.enc_rows, d_acts.T @ x)
    torch.testing.assert_close(got.b_enc, d_acts.sum(0))
    assert got.n_fired.tolist()[:10] == [2, 1, 0, 0, 6, 0, 0, 2, 1, 1]
    slow = sparse_weight_grads(values, d_values, indices, grad_out, x, D_SAE, backend="reference")
    assert torch.equal(got.n_fired, slow.n_fired)
    torch.testing.assert_close(tuple(got[:3]), tuple(slow[:3]))


def test_weight_grads_are_bitwise_repeatable_at_size():
    generator = torch.Generator().manual_seed(0)
    indices = (torch.rand(509, 31, generator=generator) ** 3 * 1009).long()
    values, d_values = torch.randn(2, 509, 31, generator=generator)
    grad_out, x = torch.randn(2, 509, 67, generator=generator)
    first = sparse_weight_grads(values, d_values, indices, grad_out, x, 1009)
    again = sparse_weight_grads(values, d_values, indices, grad_out, x, 1009)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    slow = sparse_weight_grads(
        values.double(), d_values.double(), indices, grad_out.double(), x.double(), 1009,
        backend="reference",
    )  # fmt: skip
    for name in ("dec_rows", "enc_rows", "b_enc"):
        error = (getattr(first, name) - getattr(slow, name)).norm() / getattr(slow, name).norm()
        assert float(error) < 1e-6


def test_a_whole_step_equals_dense_autograd():
    given = leaves("x", "enc_rows", "b_enc", "b_in", "dec_rows", "b_dec")
    x, enc, b_enc, b_in, dec, b_dec = given
    found = encode_topk(x, enc, b_enc, K, b_in=b_in)
    ours = torch.autograd.grad(
        sparse_decode(found.values, found.indices, dec, b_dec).square().sum(), given
    )
    pre = (x - b_in) @ enc.T + b_enc
    mask = torch.zeros_like(pre).scatter(1, found.indices, 1.0)
    dense = torch.autograd.grad(((pre.relu() * mask) @ dec + b_dec).square().sum(), given)
    for got, expected in zip(ours, dense, strict=True):
        torch.testing.assert_close(got, expected)


DEAD = torch.zeros(D_SAE, dtype=torch.bool).index_fill(0, torch.tensor([2, 3, 11, 12, 19]), True)


@pytest.mark.parametrize("k_aux", [1, 3, 5, 50])
def test_auxk_equals_the_masked_dense_form_with_all_gradients(k_aux):
    outcomes = []
    for backend in ("torch", "reference"):
        given = leaves("x", "enc_rows", "b_enc", "dec_rows", "b_in")
        x_hat = auxk(*given[:4], DEAD, k_aux, b_in=given[4], backend=backend)
        outcomes.append((x_hat, *torch.autograd.grad(x_hat.square().sum(), given)))
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected)
    enc_grad = outcomes[0][2]
    assert not enc_grad[~DEAD].any()
    assert enc_grad[DEAD].any()


def test_auxk_gradcheck_and_no_dead_latents():
    def x_hat(x, enc_rows, b_enc, dec_rows, b_in):
        return auxk(x, enc_rows, b_enc, dec_rows, DEAD, 2, b_in=b_in)

    given = leaves("x", "enc_rows", "b_enc", "dec_rows", "b_in")
    assert torch.autograd.gradcheck(x_hat, given)
    assert torch.equal(auxk(*given[:4], DEAD & False, 2), torch.zeros(BATCH, D_OUT).double())


def test_wrong_arguments_are_refused():
    values, indices = codes()
    dec, b_dec = (t.detach() for t in leaves("dec_rows", "b_dec"))
    with pytest.raises(ValueError, match=r"indices must lie in 0\.\.22, got values from 0 to 23"):
        sparse_decode(values, indices.clone().fill_(0).index_fill(1, torch.tensor([1]), 23), dec)
    with pytest.raises(TypeError, match=r"dec_rows must have the dtype of values, torch\.float64"):
        sparse_decode(values, indices, dec.float())
    given = [t.detach() for t in leaves("x", "enc_rows", "b_enc")]
    with pytest.raises(ValueError, match="k must lie between 1 and d_sae=23, got 24"):
        encode_topk(*given, 24)
    with pytest.raises(ValueError, match="k_aux must be at least 1, got 0"):
        auxk(*given, dec, DEAD, 0)
    with pytest.raises(ValueError, match="backend must be one of"):
        sparse_decode(values, indices, dec, b_dec, backend="cuda")
