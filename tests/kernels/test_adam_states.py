import pytest
import torch

from sae_kernels import adam, latent_adam_
from sae_kernels.adam_states import Packed, n_blocks, pack_, rounded, unpack

D_SAE, D_OUT = 29, 523  # three blocks of a row, the last one not full


def states(dtype: torch.dtype):
    zeros = (torch.zeros(D_SAE, D_OUT, dtype=dtype), torch.zeros(D_SAE, D_OUT, dtype=dtype))
    shape = (D_SAE, n_blocks(D_OUT))
    scales = (torch.zeros(shape), torch.zeros(shape)) if dtype == torch.uint8 else None
    return zeros, scales


def test_rounding_to_bfloat16_is_up_or_down_and_right_on_average():
    generator = torch.Generator().manual_seed(0)
    low, high = 1.0, 1.0 + 2**-7
    for share in (0.25, 0.9):
        values = torch.full((20000,), low + share * (high - low))
        result = rounded(values, generator).float()
        assert result.unique().tolist() == [low, high]
        assert float((result == high).float().mean()) == pytest.approx(share, abs=0.02)
        assert rounded(-values, generator).float().unique().tolist() == [-high, -low]
    edge = torch.tensor([0.0, 3.0, float("inf"), float("nan")])
    assert torch.equal(rounded(edge, generator)[:3].float(), edge[:3])
    assert bool(rounded(edge, generator)[3].isnan())


def test_eight_bits_keep_seven_powers_of_ten_on_average(normal):
    generator = torch.Generator().manual_seed(0)
    values = normal(D_SAE, D_OUT, seed=1) * 10 ** normal(D_SAE, D_OUT, seed=2)
    for signed in (True, False):
        right = values if signed else values.square()
        shape = (D_SAE, n_blocks(D_OUT))
        state = Packed(torch.zeros(D_SAE, D_OUT, dtype=torch.uint8), torch.zeros(shape))
        assert torch.equal(unpack(state, signed=signed), torch.zeros(D_SAE, D_OUT))
        mean = torch.zeros(D_SAE, D_OUT)
        for _ in range(300):
            pack_(state, right, generator, signed=signed)
            result = unpack(state, signed=signed)
            mean += result / 300
            large = right.abs() > 1e-4 * right.abs().max(dim=1, keepdim=True).values
            assert float((result / right - 1)[large].abs().max()) < 2.5
            assert bool((result[right != 0] != 0).all()) or signed
        assert float((mean - right).norm() / right.norm()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_a_second_moment_that_follows_slowly_arrives(dtype):
    """To the nearest it stands still where a step is less than half the distance of numbers."""
    zeros, scales = states(dtype)
    rows, grad = torch.zeros(D_SAE, D_OUT), torch.full((D_SAE, D_OUT), 0.5)
    grad[:, 0] = 1.0
    for step in range(1, 401):
        latent_adam_(rows, grad, *zeros, step, lr=0.0, scales=scales, betas=(0.9, 0.99))
    second = unpack(Packed(zeros[1], scales[1] if scales else None), signed=False)
    expected = 0.25 * (1 - 0.99**400)
    assert float(second[:, 1:].mean()) == pytest.approx(expected, rel=0.02)
    first = unpack(Packed(zeros[0], scales[0] if scales else None), signed=True)
    assert float(first[:, 1:].mean()) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.uint8, 0.12)], ids=str)
def test_steps_are_nearly_those_of_float32(dtype, error, backend, normal):
    start = torch.nn.functional.normalize(normal(D_SAE, D_OUT), dim=1)
    wide, small = start.clone(), start.clone()
    m, v = torch.zeros(D_SAE, D_OUT), torch.zeros(D_SAE, D_OUT)
    zeros, scales = states(dtype)
    shadow = torch.zeros(D_SAE, D_OUT, dtype=torch.bfloat16)
    for step in range(1, 8):
        grad = normal(D_SAE, D_OUT, seed=step)
        options = {"lr": 1e-3, "project": True, "norm": "unit", "clip": torch.tensor(0.5)}
        latent_adam_(wide, grad, m, v, step, **options)
        latent_adam_(
            small, grad, *zeros, step, scales=scales, shadow=shadow, backend=backend, **options
        )
    assert 0 < float((small - wide).norm()) < error * float((wide - start).norm())
    assert torch.equal(shadow, small.bfloat16())
    torch.testing.assert_close(small.norm(dim=1), torch.ones(D_SAE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_the_same_seed_and_step_repeat_and_others_do_not(dtype, normal, monkeypatch):
    monkeypatch.setattr(adam, "CHUNK", 11 * D_OUT)

    def run(seed: int) -> torch.Tensor:
        rows, (zeros, scales) = normal(D_SAE, D_OUT), states(dtype)
        for step in (1, 2, 3):
            grad = normal(D_SAE, D_OUT, seed=step)
            latent_adam_(rows, grad, *zeros, step, lr=0.1, scales=scales, seed=seed)
        return rows

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


def test_bad_states_are_refused(shipped, normal):
    bare = shipped(latent_adam_)
    rows, grad = normal(D_SAE, D_OUT), normal(D_SAE, D_OUT, seed=1)
    zeros, scales = states(torch.uint8)
    with pytest.raises(ValueError, match="scales must be given for exp_avg of 8 bits, got none"):
        bare(rows, grad, *zeros, 1, lr=0.1)
    with pytest.raises(ValueError, match=r"scales must have the shape \(29, 3\), got \(29, 2\)"):
        bare(rows, grad, *zeros, 1, lr=0.1, scales=(scales[0][:, :2], scales[1]))
    with pytest.raises(TypeError, match="exp_avg_sq must have the dtype of exp_avg, got"):
        bare(rows, grad, zeros[0], zeros[1].bfloat16(), 1, lr=0.1, scales=scales)
    with pytest.raises(TypeError, match="rows must be float32 beside states of fewer bits"):
        bare(rows.double(), grad.double(), *zeros, 1, lr=0.1, scales=scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_a_skipped_step_leaves_states_of_fewer_bits(dtype, normal):
    rows, (zeros, scales) = normal(D_SAE, D_OUT), states(dtype)
    options = {"lr": 0.1, "scales": scales, "norm": "unit"}
    latent_adam_(rows, normal(D_SAE, D_OUT, seed=1), *zeros, 1, **options)
    held = (rows, *zeros, *(scales or ()))
    before = [tensor.clone() for tensor in held]
    nan, number = torch.full_like(rows, torch.nan), torch.tensor(1.0)
    latent_adam_(rows, nan, *zeros, number, skip=torch.tensor(1.0), seed=5, **options)
    assert all(torch.equal(*pair) for pair in zip(before, held, strict=True))
