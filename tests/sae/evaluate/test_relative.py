import numpy as np
import pytest
import torch

from sae.evaluate.spaces import Draws, compare
from sae.evaluate.translation import asif, relative, sparse_relative


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


def by_hand(x, y, anchors, kind, k):
    """Row by row in NumPy, from the papers' formulas."""
    sides = []
    for rows in (x, y):
        rows = (rows - rows.mean(0)).numpy()
        unit = rows / np.linalg.norm(rows, axis=1)[:, None]
        cosine = unit[~anchors.numpy()] @ unit[anchors.numpy()].T
        if kind == "asif":
            n_left = round(0.1 * int(anchors.sum()))
            smallest = np.sort(cosine, axis=1)[:, [-n_left]]
            cosine = np.where(cosine >= smallest, cosine, 0).clip(0) ** 8
        sides.append(cosine / np.linalg.norm(cosine, axis=1)[:, None])
    scores = sides[0] @ sides[1].T
    if kind == "relative":
        return scores
    rank = (scores > scores.diagonal()[:, None]).sum(axis=1)
    return (rank < k).mean()


@pytest.mark.parametrize("kind", ["relative", "relative search", "asif"])
def test_anchored_measures_are_their_formulas(draw, kind):
    hidden = draw(211, 5)
    x = hidden @ draw(5, 17, 1) + 0.5 * draw(211, 17, 2) + 3
    y = hidden @ draw(5, 13, 3) + 0.5 * draw(211, 13, 4)
    drawn = Draws.of(torch.arange(211), 99, 99, 0)
    [figure] = compare({"x": x, "y": y}, [(0, 1)], kind, drawn, k=7)[0].values()
    expected = by_hand(x, y, drawn.fitted, kind, 7)
    if kind == "relative":
        null = expected.sum() / 106**2  # all pairs, as exchanges average to
        assert figure.chance == pytest.approx(null, abs=0.02)
        expected = expected.diagonal().mean()
    else:
        assert figure.chance == pytest.approx(7 / 106, abs=0.02)
    assert figure.value == pytest.approx(expected, abs=1e-6)
    assert figure.p == 0.01
    far = compare({"x": x, "z": draw(211, 13, 9)}, [(0, 1)], kind, drawn, k=7)[0][0, 1]
    assert far.p > 0.02
    assert far.high < figure.low


def test_rotated_and_scaled_rows_are_found_by_every_search(draw, rotation):
    x = draw(83, 7)
    drawn = Draws.of(torch.arange(83), 9, 9, 0)
    for kind in ("relative", "relative search", "asif"):
        [figure] = compare({"x": x, "y": 3 * x @ rotation(7) + 5}, [(0, 1)], kind, drawn, k=1)[
            0
        ].values()
        assert figure.value == pytest.approx(1)


def test_a_search_among_no_more_rows_than_are_looked_at_is_left_out(draw):
    drawn = Draws.of(torch.arange(20), 9, 9, 0)
    results, [problem] = compare({"x": draw(20, 3), "y": draw(20, 3)}, [(0, 1)], "asif", drawn)
    assert results == {}
    assert problem == "neighbours must be below the 10 rows searched, got 10"
