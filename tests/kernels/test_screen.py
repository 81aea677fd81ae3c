import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sae_kernels import encode_topk, screen, screened_topk
from sae_kernels.product import Product
from sae_kernels.select import topk_select_reference

SCREENS = ["bfloat16", "float32"]
KINDS = [
    "normal",
    "ties",
    "zero",
    "scales",
    "denormal",
    "equal rows",
    "margins",
    "infinite",
    "nan",
]
AGAINST = [
    "large",
    "x rounds against",
    "rows round against",
    "underflow",
    "overflow",
    "bias cancels",
]
BATCH, D_IN, D_SAE = 13, 37, 1031


def against(kind, x, rows, bias, g):
    """Make all errors of the screen add up, or what bounds them underflow or overflow."""
    width, sign = x.shape[1], torch.where(torch.arange(x.shape[1]) % 2 == 0, 1.0, -1.0)
    ones = sign.expand(x.shape).clone()
    halves = 1 + 2.0**-8 - ones * 2.0**-12  # rounded down, up, down, ...
    some = (torch.rand(rows.shape, generator=g) < 0.9).float()
    match kind:
        case "large":
            return x * 3e18, rows * 3e18, bias
        case "x rounds against":
            return halves, sign * some, bias * 1e-3
        case "rows round against":
            return ones, halves[0] * some, bias * 1e-3
        case "underflow":
            return halves * 2.0**-90, sign * some * 2.0**60, bias * 0.0
        case "overflow":  # finite as a whole, -inf if summed from the left
            rows = 7.8e19 / (width - 4) * (1 + rows.clamp(-1, 1) * 1e-3)
            rows[:, :4] = -2e19
            return torch.full(x.shape, 1e19), rows, bias
    x = torch.randint(-8, 9, (1, width), generator=g).float().expand(x.shape).clone()
    rows = torch.randint(-8, 9, rows.shape, generator=g).float()
    return x, rows, bias.abs() - rows @ x[0]  # "bias cancels"


def draw(kind, seed, batch=BATCH, width=D_IN, d_sae=D_SAE):
    """x, enc_rows and b_enc of a kind that breaks a careless screen."""
    g = torch.Generator().manual_seed(seed)
    x, rows = torch.randn(batch, width, generator=g), torch.randn(d_sae, width, generator=g)
    bias = torch.randn(d_sae, generator=g)
    match kind:
        case "ties":
            x, rows, bias = x.round(), rows.round(), bias.round()
        case "zero":
            x[::2], bias = 0.0, torch.zeros(d_sae)
        case "scales":
            x *= 10.0 ** torch.randint(-12, 13, x.shape, generator=g)
            rows *= 10.0 ** torch.randint(-12, 13, (d_sae, 1), generator=g)
        case "denormal":
            x, bias = x * 1e-41, bias * 1e-42
            rows[::2] *= 1e-20
        case "equal rows":
            rows[::3], bias[::3] = rows[0].clone() * 3, bias[0].clone()
        case "margins":  # values that differ by single roundings of float32
            rows = rows[:1] + rows * 1e-7
            bias.zero_()
        case "infinite":
            x[1, 2], rows[5, 3], bias[7] = math.inf, -math.inf, math.inf
        case "nan":
            x[1, 2], bias[7] = math.nan, math.nan
        case _ if kind in AGAINST:
            x, rows, bias = against(kind, x, rows, bias, g)
    return x, rows, bias


def definition(x, rows, bias, k):
    """Compute every pre-activation as the module defines it, and sort."""
    every = torch.arange(len(rows)).expand(len(x), -1)
    return topk_select_reference(screen.rescore(Product(x, rows, bias), every), k, relu=False)


def same(one, two):
    """Tell whether values and indices are the same bits; NaN has many."""
    nan = one.values.isnan() & two.values.isnan()
    bits = one.values.view(torch.int32) == two.values.view(torch.int32)
    return torch.equal(one.indices, two.indices) and bool((nan | bits).all())


@pytest.mark.parametrize("name", SCREENS)
@pytest.mark.parametrize("kind", KINDS + AGAINST)
@settings(max_examples=5)
@given(seed=st.integers(0, 1 << 20), k=st.integers(1, 4))
@example(seed=0, k=3)
def test_every_screen_gives_the_same_bits(kind, name, seed, k):
    x, rows, bias = draw(kind, seed)
    expected = definition(x, rows, bias, k)
    screened = screened_topk(x, rows, bias, k, relu=False, screen=name)
    assert same(screened, expected)
    assert same(encode_topk(x, rows, bias, k, relu=False), expected)


@pytest.mark.parametrize("kind", KINDS + AGAINST)
@pytest.mark.parametrize("name", SCREENS)
def test_nothing_is_above_its_bound(name, kind):
    for seed in range(3):
        product = Product(*draw(kind, seed, batch=31, width=(37, 67, 509)[seed]))
        upper = screen._upper16(product) if name == "bfloat16" else screen._upper32(product)
        out = torch.empty(31, D_SAE, dtype=upper.x.dtype)
        upper.into(slice(None), out)
        limit = out.double() * (1 + upper.relative * out.double().sign()) + upper.slack[:, None]
        pre = screen.rescore(product, torch.arange(D_SAE).expand(31, -1))
        assert not (limit < pre).any()
        if kind == "normal":  # and the bound is no empty one
            norms = product.x.norm(dim=1)[:, None] * product.rows.norm(dim=1)
            assert (limit - pre).max() < 0.05 * norms.max()


@pytest.mark.parametrize("width", [20, 26, 30, 38])
@pytest.mark.parametrize("rounds", ["x", "rows"])
def test_the_bound_holds_where_its_norms_would_be_rounded_down(width, rounds):
    """All roundings of one side lie along the other: the error is the product of the norms."""
    ones = torch.where(torch.arange(width) % 2 == 0, 1.0, -1.0)
    halves = 1 + 2.0**-8 - ones * 2.0**-12
    x, row = (halves, ones) if rounds == "x" else (ones, halves)
    product = Product(x[None], row.expand(16, -1).clone(), torch.zeros(16))
    upper, out = screen._upper16(product), torch.empty(1, 16, dtype=torch.bfloat16)
    upper.into(slice(None), out)
    limit = out.double() * (1 + upper.relative * out.double().sign()) + upper.slack[:, None]
    assert (limit >= screen.rescore(product, torch.arange(16)[None])).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("share", [0.99, 1 - 2.0**-7, 1.0, 1 + 2.0**-7, 1.01, 2.0, 1e6])
def test_the_bound_holds_for_a_bias_of_any_size(share, sign, normal):
    """Also where it takes away nearly all of the product, and only roundings are left."""
    x = normal(31, 61)
    rows = sign * x[0].expand(64, -1) * (1 + normal(64, 61, seed=1) * 1e-4)
    product = Product(x, rows, -share * (rows @ x[0]))
    upper, out = screen._upper16(product), torch.empty(31, 64, dtype=torch.bfloat16)
    upper.into(slice(None), out)
    limit = out.double() * (1 + upper.relative * out.double().sign()) + upper.slack[:, None]
    assert (limit >= screen.rescore(product, torch.arange(64).expand(31, -1))).all()


def test_the_bound_holds_where_a_bias_of_many_digits_leaves_a_few_units():
    """Products of 8-bit numbers are exact, so nothing but the bias is rounded."""
    x = torch.tensor([[255.0, 129.0, 129.0, 183.0]])
    left = torch.arange(-40.0, 41.0)
    product = Product(x, x.expand(81, -1).clone(), left - x.square().sum())
    upper, out = screen._upper16(product), torch.empty(1, 81, dtype=torch.bfloat16)
    upper.into(slice(None), out)
    limit = out.double() * (1 + upper.relative * out.double().sign()) + upper.slack[:, None]
    assert torch.equal(screen.rescore(product, torch.arange(81)[None]), left[None])
    assert (limit >= left).all()


def test_the_definition_is_one_rounding():
    """Against exact sums: products of float32 are exact in float64, and `fsum` rounds once."""
    x, rows, bias = draw("normal", 3, batch=7, width=61)
    indices = torch.randint(0, D_SAE, (7, 11), generator=torch.Generator().manual_seed(0))
    values = screen.rescore(Product(x, rows, bias), indices)
    for n in range(7):
        for i, j in enumerate(indices[n].tolist()):
            terms = [a * b for a, b in zip(x[n].tolist(), rows[j].tolist(), strict=True)]
            exact = math.fsum([*terms, bias[j].item()])
            assert values[n, i] == torch.tensor(exact, dtype=torch.float64).float()


def test_a_value_does_not_depend_on_what_else_is_asked_for(monkeypatch):
    for width in (37, 64):
        product = Product(*draw("normal", 4, width=width))
        every = torch.arange(D_SAE).expand(BATCH, -1)
        whole = screen.rescore(product, every)
        few = torch.randint(0, D_SAE, (BATCH, 5), generator=torch.Generator().manual_seed(1))
        assert torch.equal(screen.rescore(product, few), whole.gather(1, few))
        part = product._replace(x=product.x[3:8].clone())
        assert torch.equal(screen.rescore(part, every[3:8]), whole[3:8])
        monkeypatch.setattr(screen, "LATENT_BYTES", 7 * 8 * 64)
        monkeypatch.setattr(screen, "RESCORED_ROWS", 3)
        assert torch.equal(screen.rescore(product, every), whole)


def test_a_fooled_screen_is_noticed():
    """More latents than there are candidates round up; the best ones round down."""
    width, d_sae, k = 64, 521, 2
    rows = torch.full((d_sae, width), 1 + 2**-8 + 2**-12)  # to 1 + 2^-7
    rows[300:302, ::2], rows[300:302, 1::2] = 1 + 2**-7 + 2**-8 - 2**-12, 1.0
    x = torch.ones(3, width)
    low = (x.bfloat16() @ rows.bfloat16().T).float()
    assert 300 not in low.topk(257, dim=1).indices[0].tolist()
    result = screened_topk(x, rows, torch.zeros(d_sae), k, screen="bfloat16")
    assert result.indices.tolist() == [[300, 301]] * 3
    assert result.n_fallback == 3
    again = screened_topk(x, rows, torch.zeros(d_sae), k, screen="float32")
    assert again.n_fallback == 0
    assert torch.equal(again.values, result.values)


def test_random_data_needs_no_fallback_in_nearly_every_row(normal):
    x, rows = normal(257, 512), normal(8192, 512, seed=1)
    rows /= rows.norm(dim=1, keepdim=True)
    assert screened_topk(x, rows, torch.zeros(8192), 32, screen="float32").n_fallback == 0
    assert screened_topk(x, rows, torch.zeros(8192), 32, screen="bfloat16").n_fallback < 20


@pytest.mark.parametrize("name", SCREENS)
def test_equal_latents_at_the_boundary_are_settled_by_index(name):
    x, rows, bias = draw("normal", 5)
    rows[1::2], bias[1::2] = rows[:-1:2].clone(), bias[:-1:2].clone()  # each latent twice
    result = screened_topk(x, rows, bias, 3, screen=name)
    assert same(result, definition(x, rows, bias, 3))
    values = result.values.sort(dim=1, descending=True).values
    assert torch.equal(values[:, 0], values[:, 1])
    assert (values[:, 1] > values[:, 2]).all()


@pytest.mark.parametrize("name", SCREENS)
def test_gradients_equal_dense_autograd(name, normal):
    x, rows, bias = draw("normal", 6)
    tensors, weights = (x, rows, bias, normal(D_IN, seed=9)), normal(BATCH, 3, seed=8)
    inputs = [t.clone().requires_grad_() for t in tensors]
    values, indices, _ = screened_topk(*inputs[:3], 3, b_in=inputs[3], relu=False, screen=name)
    ours = torch.autograd.grad((values * weights).sum(), inputs)
    inputs = [t.double().requires_grad_() for t in tensors]
    pre = ((inputs[0] - inputs[3]) @ inputs[1].T + inputs[2]).gather(1, indices)
    assert (values - pre).abs().max() <= 2e-6
    theirs = torch.autograd.grad((pre * weights).sum(), inputs)
    for got, want in zip(ours, theirs, strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()
    assert not indices.requires_grad


def test_the_relu_clamps_values_alone():
    x, rows, bias = draw("normal", 7)
    bias -= 30.0
    plain = screened_topk(x, rows, bias, 3, relu=False)
    clamped = screened_topk(x, rows, bias, 3)
    assert (plain.values < 0).any()
    assert torch.equal(clamped.indices, plain.indices)
    assert torch.equal(clamped.values, plain.values.relu())


def test_the_default_screen_is_the_one_that_was_measured_to_be_faster(monkeypatch):
    product = Product(*draw("normal", 8, d_sae=2053))
    monkeypatch.setattr(screen, "PAYS_FROM", BATCH)
    for speedup, expected in ((1.0, "float32"), (3.0, "bfloat16")):
        monkeypatch.setattr(screen, "bf16_speedup", lambda speedup=speedup: speedup)
        assert screen.best_screen(product, 3) == expected
    wide = Product(torch.zeros(BATCH, 8192), torch.zeros(2053, 8192), torch.zeros(2053))
    assert screen.best_screen(wide, 3) == "float32"  # too many candidates
    monkeypatch.setattr(screen, "PAYS_FROM", BATCH + 1)
    assert screen.best_screen(product, 3) == "float32"


def test_the_measured_speedup_is_a_ratio():
    first = screen.bf16_speedup()
    assert 0.01 < first < 100
    assert screen.bf16_speedup() == first  # once a process


def test_dictionaries_of_few_latents_are_not_rescored():
    x, rows, bias = draw("normal", 9, d_sae=509)
    values, indices, n_fallback = screened_topk(x, rows, bias, 2, relu=False, screen="bfloat16")
    plain = torch.addmm(bias, x, rows.T)
    assert n_fallback == 0
    assert torch.equal(values, plain.gather(1, indices))


def test_autocast_does_not_lower_the_precision():
    x, rows, bias = draw("normal", 10)
    plain = screened_topk(x, rows, bias, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(screened_topk(x, rows, bias, 3), plain)


@pytest.mark.parametrize("name", SCREENS)
def test_no_rows_give_no_rows(name):
    x, rows, bias = draw("normal", 11)
    result = screened_topk(x[:0], rows, bias, 3, screen=name)
    assert result.values.shape == result.indices.shape == (0, 3)
    assert result.n_fallback == 0


@pytest.mark.parametrize("name", SCREENS)
def test_neither_all_pre_activations_nor_all_latents_in_float64_are_held(
    name, monkeypatch, largest
):
    x, rows, bias = draw("normal", 12, batch=499, d_sae=2053)
    monkeypatch.setattr(screen, "CHUNK_BYTES", 16 * 2053 * 2)
    monkeypatch.setattr(screen, "WORKSPACE_BYTES", 16 * 2053 * 4)
    monkeypatch.setattr(screen, "LATENT_BYTES", 64 * 40 * 8)
    with largest:
        screened_topk(x, rows, bias, 2, screen=name)
    assert largest.seen <= 2053 * (D_IN + screen.EXTRA)  # the latents in bfloat16, with the bound


def test_bad_arguments_are_refused(shipped):
    bare = shipped(screened_topk)
    x, rows, bias = draw("normal", 13)
    with pytest.raises(TypeError, match=r"x must be torch\.float32 to be screened, got torch\.flo"):
        bare(x.double(), rows.double(), bias.double(), 3)
    with pytest.raises(ValueError, match="screen must be one of 'bfloat16', 'float32', got 'int8'"):
        bare(x, rows, bias, 3, screen="int8")
    with pytest.raises(ValueError, match="k must lie between 1 and d_sae=1031, got 0"):
        bare(x, rows, bias, 0)
    with pytest.raises(ValueError, match=r"b_enc must have the shape \(1031\), got \(1030,\)"):
        bare(x, rows, bias[1:], 3)
    meta = [t.to("meta") for t in (x, rows, bias)]
    with pytest.raises(ValueError, match="x must be on a CPU to be screened, got meta; use encode"):
        bare(*meta, 3)
