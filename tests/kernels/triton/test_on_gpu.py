"""The compiled kernels at real sizes: `make gpu`. Everything else here runs in the interpreter."""

import pytest
import torch

from sae_kernels.adam_triton import latent_adam_
from sae_kernels.decode_triton import csr_weighted_rows, decode_mse, row_products, weighted_rows
from sae_kernels.encode_triton import encode_topk
from sae_kernels.grads_triton import weight_grads
from sae_kernels.select_triton import topk_select

pytestmark = pytest.mark.gpu

BATCH, D_SAE, WIDTH, K = 509, 32768, 768, 32
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.fixture
def draw():
    """Standard normal numbers on the device."""
    generator = torch.Generator("cuda").manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(
        shape, generator=generator, device="cuda", dtype=torch.float32
    ).to(dtype)


@pytest.fixture
def latents(draw):
    """Values and distinct, ascending indices."""
    indices = draw(BATCH, D_SAE).topk(K, dim=1).indices.sort(1).values
    return draw(BATCH, K), indices


def assert_selects(pre, k):
    order = torch.sort(pre.double() + 0.0, dim=1, descending=True, stable=True).indices[:, :k]
    values, indices = topk_select(pre, k, False, False)
    assert torch.equal(indices, order.sort(1).values)
    assert torch.equal(values.nan_to_num(), pre.gather(1, indices).nan_to_num())


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(
    ("d_sae", "k"),
    [(131072, 32), (131071, 32), (65536, 1024), (1 << 20, 64), (1000, 7), (24576, 1), (1021, 1021)],
)
def test_selection_is_exact(d_sae, k, dtype, draw):
    pre = draw(61, d_sae, dtype=dtype)
    for case in (pre, (2 * pre).round(), torch.full_like(pre, -1.5), 0 * pre, -pre.abs() * 1e-39):
        assert_selects(case, k)
    pre[3, ::7] = torch.nan
    pre[5, ::11] = torch.inf
    pre[7, :] = -torch.inf
    pre[9, 512:640] += 100
    assert_selects(pre, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [256, 768, 771, 2304])
@pytest.mark.parametrize("gated", [False, True])
def test_encoding(gated, width, dtype, draw):
    torch.backends.cuda.matmul.allow_tf32 = False
    x, rows = draw(BATCH, width, dtype=dtype), draw(D_SAE + 3, width, dtype=dtype)
    bias = draw(D_SAE + 3)
    values, indices = encode_topk(x, rows, bias, K, False, gated)
    pre = x.double() @ rows.double().T + bias.double()
    best = pre.topk(K, dim=1).values
    chosen = pre.gather(1, indices)
    assert (indices.diff(dim=1) > 0).all()
    assert (values - chosen).abs().max() < 1e-5 * best.max()
    assert (chosen.sort(1, descending=True).values - best).abs().max() < 1e-5 * best.max()


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("width", [64, WIDTH, 771, 2304, 4096])
def test_decoding(width, dtype, draw, latents, error):
    values, indices = latents
    table, target = draw(D_SAE, width, dtype=dtype), draw(BATCH, width, dtype=dtype)
    bias = draw(width, dtype=dtype)
    rows = table[indices].double()
    x_hat = torch.einsum("nk,nkd->nd", values.double(), rows)
    assert error(weighted_rows(values, indices, table), x_hat) < TOLERANCES[dtype]
    row_ptr = torch.arange(0, BATCH * K + 1, K, device="cuda")
    flat = csr_weighted_rows(values.flatten(), indices.flatten(), row_ptr, table)
    assert torch.equal(flat, weighted_rows(values, indices, table))
    products = torch.einsum("nd,nkd->nk", target.double(), rows)
    assert error(row_products(target, table, indices), products) < 1e-5
    off = x_hat + bias.double() - target.double()
    right = (off + target.double(), off.square().sum(1), off)
    right = (*right, torch.einsum("nd,nkd->nk", off, rows))
    for out, want in zip(decode_mse(*latents, table, bias, target, 0.5), right, strict=True):
        assert error(out, want) < (1e-5 if out.dtype == torch.float32 else TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("n_latents", [1, 7, 1000, D_SAE])
def test_weight_gradients_of_hot_and_cold_latents(n_latents, dtype, draw, error):
    indices = torch.randint(n_latents, (BATCH, K), device="cuda")
    values, d_values = draw(BATCH, K), draw(BATCH, K)
    grad, x = draw(BATCH, WIDTH, dtype=dtype), draw(BATCH, 2304, dtype=dtype)
    result = weight_grads(values, d_values, indices, grad, x, D_SAE)
    dense = torch.zeros(BATCH, D_SAE, dtype=torch.float64, device="cuda")
    for latent, value in zip(indices.T, values.T.double(), strict=True):  # one of each row
        dense[torch.arange(BATCH, device="cuda"), latent] += value
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert error(result.dec_rows, dense.T @ grad.double()) < tolerance
    flat = torch.bincount(indices.flatten().cpu(), d_values.flatten().double().cpu(), D_SAE)
    assert error(result.b_enc.cpu(), flat) < 1e-5
    assert torch.equal(result.n_fired.cpu(), indices.flatten().cpu().bincount(minlength=D_SAE))
    for _ in range(5):
        again = weight_grads(values, d_values, indices, grad, x, D_SAE)
        assert all(torch.equal(one, other) for one, other in zip(result, again, strict=True))


@pytest.mark.parametrize("width", [64, 768, 2304, 8192, 16384])
def test_adam_beside_its_definition(width, draw, error):
    rows, mean, square = draw(97, width), *torch.zeros(2, 97, width).cuda()
    shadow = torch.empty(97, width, dtype=torch.bfloat16, device="cuda")
    grad = draw(97, width)
    w, g = rows.double(), 0.5 * grad.double()
    g = g - w * (g * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True)
    w = w - 0.01 * g / (g.abs() + 1e-8)
    latent_adam_(
        rows, grad, mean, square, lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0,
        step=torch.ones((), device="cuda"), skip=None, project=True, norm="unit",
        clip=torch.tensor(0.5).cuda(), shadow=shadow,
    )  # fmt: skip
    right = w / w.norm(dim=1, keepdim=True)
    assert error(rows, right) < 1e-5
    assert error(shadow, right) < 3e-3
    assert torch.equal(shadow, rows.bfloat16())


def test_a_cuda_graph_repeats_the_step(draw):
    x, table = draw(BATCH, WIDTH, dtype=torch.bfloat16), draw(D_SAE, WIDTH, dtype=torch.bfloat16)
    bias = draw(D_SAE)

    def work():
        values, indices = encode_topk(x, table, bias, K, True)
        made = decode_mse(values, indices, table, None, x, 0.5)
        return weight_grads(values, made.d_values, indices, made.grad_x_hat, x, D_SAE)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))
