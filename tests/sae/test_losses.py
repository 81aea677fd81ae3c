import math

import pytest
import torch

from sae import losses


def test_squared_error_sums_over_d_and_averages_over_rows():
    x = torch.zeros(2, 3)
    x_hat = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 1.0]])
    assert float(losses.squared_error(x, x_hat)) == 5.0


def test_l1_is_unchanged_when_scale_moves_between_activation_and_direction():
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(5, 23, generator=generator)
    rows = torch.randn(23, 7, generator=generator)
    scale = torch.rand(23, generator=generator) + 0.5
    before = losses.l1_decoder_norm(acts, rows.norm(dim=1))
    after = losses.l1_decoder_norm(acts * scale, (rows / scale[:, None]).norm(dim=1))
    torch.testing.assert_close(before, after)
    sparse = losses.l1_decoder_norm(torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 0.5]]))
    assert float(sparse) == 6.5


def test_a_power_of_1_is_the_l1_and_silent_latents_have_no_gradient():
    acts = torch.tensor([[0.0, 4.0], [9.0, 0.0]], requires_grad=True)
    norms = torch.tensor([1.0, 4.0])
    assert losses.power_decoder_norm(acts, norms, 1.0).item() == (16 + 9) / 2
    result = losses.power_decoder_norm(acts, norms, 0.5)
    assert result.item() == pytest.approx((4 + 3) / 2)
    [grad] = torch.autograd.grad(result, [acts])
    assert grad.flatten().tolist() == pytest.approx([0, 0.5 * 2 / 2 / 2, 0.5 / 3 / 2, 0])


def test_tanh_counts_what_is_far_above_0_and_is_unchanged_by_the_scale_of_a_direction():
    acts = torch.tensor([[0.0, 100.0, 0.5], [0.0, 0.0, 0.0]])
    norms = torch.tensor([7.0, 1.0, 2.0])
    result = float(losses.tanh_decoder_norm(acts, norms, 4.0))
    assert result == pytest.approx((1 + math.tanh(4.0)) / 2)
    moved = losses.tanh_decoder_norm(acts * 3, norms / 3, 4.0)
    assert float(moved) == pytest.approx(result)


def test_the_distance_to_the_threshold_counts_what_is_below_alone():
    pre = torch.tensor([[1.0, -2.0], [5.0, 0.0]])
    result = losses.pre_act_distance(pre, torch.tensor([2.0, 1.0]), torch.tensor([10.0, 0.5]))
    assert float(result) == ((2 - 1) * 10 + (1 + 2) * 0.5 + 0 + 1 * 0.5) / 2


def test_batch_variance_is_centred_per_dimension():
    x = torch.tensor([[100.0, 0.0], [102.0, 4.0]])
    assert float(losses.batch_variance(x)) == 5.0
