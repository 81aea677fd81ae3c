import pytest
import torch

from sae.evaluate.alignment import asif, relative, sparse_relative


def test_rotated_spaces_have_the_same_relative_rows(draw, rotation):
    x, anchors, turn = draw(23, 7), draw(11, 7, seed=1), rotation(7)
    result = relative(x, anchors)
    assert torch.allclose(result, relative(3 * x @ turn, anchors @ turn))
    assert result[0, 0] == pytest.approx(float(torch.cosine_similarity(x[0], anchors[0], dim=0)))


def test_sparse_relative_rows_keep_the_largest():
    rows = torch.tensor([[0.5, -0.9, 0.1, 0.4]], dtype=torch.float64)
    result = sparse_relative(rows, k=2, power=2.0)
    expected = torch.tensor([[0.25, 0.0, 0.0, 0.16]]).double()
    assert torch.allclose(result, expected / expected.norm())


def test_asif_finds_the_planted_pairs_without_training(draw):
    """Two modalities are random views of the same hidden factors."""
    hidden, view_x, view_y = draw(400, 6), draw(6, 31, seed=1), draw(6, 29, seed=2)
    x, y = hidden @ view_x + 0.05 * draw(400, 31, seed=3), hidden @ view_y
    result = asif(x[:41], y[:41], x[41:], y[41:], k=40, power=4.0)
    exact = float((result == torch.arange(41)).double().mean())
    shuffled = y[41:][torch.randperm(359, generator=torch.Generator().manual_seed(1))]
    chance = asif(x[:41], y[:41], x[41:], shuffled, k=40, power=4.0)
    assert exact > 0.9
    assert float((chance == torch.arange(41)).double().mean()) < 0.15


def test_rows_without_a_direction_and_odd_k_are_refused(draw):
    with pytest.raises(ValueError, match="anchors must have no row of norm 0"):
        relative(draw(3, 2), torch.zeros(5, 2).double())
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4, the number of anchors, got 5"):
        sparse_relative(draw(3, 4), k=5)
    with pytest.raises(ValueError, match="same examples, got 7 and 5 rows"):
        asif(draw(3, 2), draw(3, 4), draw(7, 2), draw(5, 4), k=2)
