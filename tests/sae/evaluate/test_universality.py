import pytest
import torch

from sae.evaluate.structure import universality


def test_rotated_models_have_the_same_latents(draw_float32, relu_dictionary):
    rows, x = draw_float32(17, 11), draw_float32(499, 11, seed=1)
    turn = torch.linalg.qr(draw_float32(11, 11, seed=2)).Q
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    a, b = relu_dictionary(rows), relu_dictionary((rows @ turn)[order] * 3)
    batches = [(part, part @ turn) for part in x.split(83)]
    result = universality(a, b, batches)
    assert result.paired.one_to_one == pytest.approx(1, abs=1e-5)
    assert result.paired.forward == pytest.approx(1, abs=1e-5)
    assert result.n_rows == 499
    assert result.chance.one_to_one < 0.15


def test_unrelated_streams_are_at_the_floor(draw_float32, relu_dictionary):
    a, b = relu_dictionary(draw_float32(17, 11)), relu_dictionary(draw_float32(19, 7, seed=1))
    result = universality(a, b, [(draw_float32(997, 11, seed=2), draw_float32(997, 7, seed=3))])
    assert result.paired.one_to_one == pytest.approx(result.chance.one_to_one, abs=0.03)


def test_no_rows_and_unpaired_rows_are_refused(draw_float32, relu_dictionary):
    a = relu_dictionary(draw_float32(17, 11))
    with pytest.raises(ValueError, match="batches must hold at least 2 rows, got 0"):
        universality(a, a, [])
    with pytest.raises(ValueError, match="same rows, got 7 and 5"):
        universality(a, a, [(draw_float32(7, 11), draw_float32(5, 11))])
