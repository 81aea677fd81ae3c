import pytest
import torch

from sae_kernels import batch_topk, topk_select
from sae_kernels.fused import FusedStep, StepWeights, fused_topk_step

K, D_SAE, D = 3, 31, 7
ENDS = (2, 7, 19, D_SAE)
SHARES = [(None, (1.0,)), (ENDS, (0.25, 0.25, 0.25, 0.25)), (ENDS, (0.1, 0.1, 0.1, 0.7))]
OF_ROWS = ("enc_rows", "b_enc", "b_in", "dec_rows", "b_dec")


def by_autograd(x, target, weights, of_batch, ends, shares, rounds) -> FusedStep:
    """The definition, dense, differentiated by torch."""
    leaves = [w.clone().requires_grad_() for w in weights]
    enc_rows, b_enc, b_in, dec_rows, b_dec = leaves

    def encode(read):
        pre = (read - b_in) @ enc_rows.T + b_enc
        if of_batch:
            found = batch_topk(pre.detach(), K, backend="reference")
            row = torch.arange(len(x)).repeat_interleave(found.row_ptr.diff())
            kept = torch.zeros_like(pre).index_put((row, found.indices), pre.new_ones(()))
        else:
            picked = topk_select(pre.detach(), K, backend="reference").indices
            kept = torch.zeros_like(pre).scatter(1, picked, 1.0)
        return pre.relu() * kept

    read = x
    for rate in rounds:
        read = read + rate * (x - encode(read) @ dec_rows - b_dec)
    acts, row_loss = encode(read), []
    for end in ends or (D_SAE,):
        x_hat = acts[:, :end] @ dec_rows[:end] + b_dec
        row_loss.append((x_hat - target).square().sum(1))
    row_loss = torch.stack(row_loss, 1)
    loss = (row_loss * torch.tensor(shares, dtype=x.dtype)).sum() / len(x)
    grads = torch.autograd.grad(loss, leaves)
    squares = (grads[0].square().sum(), grads[3].square().sum())
    return FusedStep(*grads, x_hat, row_loss, acts, (acts > 0).sum(0), squares)


def compare(backend, dtype, batch, of_batch, ends, shares, rounds, normal):
    x = normal(batch, D, seed=1, dtype=dtype)
    target = x if rounds else normal(batch, D, seed=2, dtype=dtype)
    shapes = ((D_SAE, D), (D_SAE,), (D,), (D_SAE, D), (D,))
    weights = StepWeights(*(normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes, 3)))
    right = by_autograd(x, target, weights, of_batch, ends, shares, rounds)
    options = {"of_batch": of_batch, "prefixes": ends, "shares": shares, "rounds": rounds}
    found = fused_topk_step(x, target, weights, K, scale=1 / batch, backend=backend, **options)
    near = 1e-12 if dtype == torch.float64 else 1e-6
    for name in (*OF_ROWS, "x_hat", "row_loss"):
        got, want = getattr(found, name).detach(), getattr(right, name).detach()
        assert got.shape == want.shape
        assert (got - want).norm() < near * want.norm(), name
    assert torch.equal(found.n_fired, right.n_fired)
    assert (found.values > 0).sum() == right.n_fired.sum()
    repeated = fused_topk_step(x, target, weights, K, scale=1 / batch, backend=backend, **options)
    assert all(torch.equal(*pair) for pair in zip(found[:-1], repeated[:-1], strict=True))
    assert (found.squares is None) == (backend == "torch")
    for got, want in zip(found.squares or (), right.squares, strict=backend == "triton"):
        assert float(got) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("rounds", [(), (0.5,), (0.5, 0.3)], ids=len)
@pytest.mark.parametrize(("ends", "shares"), SHARES)
@pytest.mark.parametrize("of_batch", [False, True])
def test_every_output_is_that_of_the_dense_definition(of_batch, ends, shares, rounds, normal):
    compare("torch", torch.float64, 13, of_batch, ends, shares, rounds, normal)


@pytest.mark.parametrize("rounds", [(), (0.5,)], ids=len)
@pytest.mark.parametrize(("ends", "shares"), SHARES[::2])
@pytest.mark.parametrize("of_batch", [False, True])
def test_the_kernels_give_the_same(of_batch, ends, shares, rounds, normal):
    compare("triton", torch.float32, 5, of_batch, ends, shares, rounds, normal)


def test_bad_arguments_are_refused(shipped, normal):
    bare = shipped(fused_topk_step)
    x, rows = normal(5, D), normal(D_SAE, D)
    good = StepWeights(rows, torch.zeros(D_SAE), None, rows, torch.zeros(D))
    with pytest.raises(ValueError, match="k must lie between 1 and d_sae=31, got 32"):
        bare(x, x, good, 32, scale=1.0)
    with pytest.raises(ValueError, match=r"b_dec must have the shape \(7\), got \(8,\)"):
        bare(x, x, good._replace(b_dec=torch.zeros(8)), 3, scale=1.0)
    with pytest.raises(TypeError, match=r"dec_rows must have the dtype of enc_rows"):
        bare(x, x, good._replace(dec_rows=rows.bfloat16()), 3, scale=1.0)
    wide = good._replace(dec_rows=normal(D_SAE, 9), b_dec=torch.zeros(9))
    with pytest.raises(ValueError, match="target must have the shape of x to be refined"):
        bare(x, normal(5, 9), wide, 3, scale=1.0, rounds=(0.5,))
