import itertools

import numpy as np
import pytest
import torch

from sae.evaluate.alignment import Correlations, match


def test_a_planted_permutation_is_recovered_exactly(draw):
    x = draw(307, 19)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(2))
    y = torch.cat([x[:, order] * 5 + 0.5 * draw(307, 19, seed=1), draw(307, 4, seed=3)], 1)
    result = Correlations(19, 23)
    result.update(x, y)
    pairs = match(result.compute())
    assert torch.equal(order[pairs.y], pairs.x)
    assert float(pairs.values.min()) > 0.9


@pytest.mark.parametrize("batch", [1, 7, 101])
def test_streamed_correlations_are_numpys(draw, batch):
    x, y = draw(101, 3) + 1000, draw(101, 5, seed=1)
    y[:, 0] += x[:, 2]
    y[:, 4] = 2.0
    result = Correlations(3, 5)
    for a, b in zip(x.split(batch), y.split(batch), strict=True):
        result.update(a, b)
    expected = np.corrcoef(x.T, y[:, :4].T)[:3, 3:]
    assert torch.allclose(result.compute()[:, :4], torch.from_numpy(expected), atol=1e-9)
    assert result.compute()[:, 4].tolist() == [0, 0, 0]
    assert result.n_rows == 101


def test_shards_merge_to_one_pass(draw):
    x, y = draw(101, 3), draw(101, 5, seed=1)
    whole, left, right = (Correlations(3, 5) for _ in range(3))
    whole.update(x, y)
    left.update(x[:17], y[:17])
    right.update(x[17:], y[17:])
    left.merge(right)
    left.merge(Correlations(3, 5))
    assert torch.allclose(left.compute(), whole.compute(), atol=1e-12)


def test_the_assignment_is_the_best_of_all(draw):
    values = draw(5, 6)
    best = max(
        float(values[range(5), list(chosen)].sum())
        for chosen in itertools.permutations(range(6), 5)
    )
    assert float(match(values).values.sum()) == pytest.approx(best)


def test_other_rows_are_refused(draw):
    with pytest.raises(ValueError, match="of the same rows, got 7 and 5"):
        Correlations(2, 3).update(draw(7, 2), draw(5, 3))
