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


def test_batch_variance_is_centred_per_dimension():
    x = torch.tensor([[100.0, 0.0], [102.0, 4.0]])
    assert float(losses.batch_variance(x)) == 5.0
