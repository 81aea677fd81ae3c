"""An affine map from one space to another: on rows, and as what is spliced into a model."""

import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from sae.evaluate.spaces import Draws, compare
from sae.evaluate.translation import RIDGE, fit_stitch


@pytest.fixture
def spaces(draw):
    x = draw(97, 5) * torch.tensor([9.0, 3, 1, 1, 0.3]) + 4
    return {"x": x, "y": x[:, :3] @ draw(3, 7, 1) + draw(97, 7, 2), "far": draw(97, 3, 3)}


def by_sklearn(x, y, fitted):
    a = x[fitted] - x[fitted].mean(0)
    x, y, fitted = x.numpy(), y.numpy(), fitted.numpy()  # tensors stop old releases
    ridge = Ridge(alpha=RIDGE * float(a.square().sum(0).mean())).fit(x[fitted], y[fitted])
    return r2_score(y[~fitted], ridge.predict(x[~fitted]), multioutput="variance_weighted")


def test_the_share_of_variance_and_its_null_are_those_of_scikit_learn(spaces):
    drawn, rows = Draws.of(torch.arange(97) // 2, 19, 50, 0), list(spaces.values())
    pairs = [(0, 1), (1, 0), (0, 2)]
    results, problems = compare(spaces, pairs, "stitching", drawn)
    assert problems == []
    for a, b in pairs:
        value = by_sklearn(rows[a], rows[b], drawn.fitted)
        assert results[a, b].value == pytest.approx(value, abs=1e-6)
        null = [by_sklearn(rows[a], rows[b][order], drawn.fitted) for order in drawn.orders]
        assert results[a, b].chance == pytest.approx(sum(null) / 19, abs=1e-5)
        reached = sum(one >= value for one in null)
        assert results[a, b].p == pytest.approx((1 + reached) / 20)
    assert results[0, 1].p == 0.05 < results[0, 2].p
    assert results[0, 1].low < results[0, 1].value < results[0, 1].high


def test_rows_of_an_example_stay_on_one_side():
    drawn = Draws.of(torch.arange(60) // 3, 1, 1, 0)
    assert int(drawn.fitted.sum()) == 30
    assert torch.equal(drawn.fitted[::3], drawn.fitted[2::3])


def test_more_columns_than_rows_or_one_example_are_left_out_with_the_reason(draw):
    wide = {"x": draw(23, 13), "y": draw(23, 3, 1)}
    _, [problem] = compare(wide, [(0, 1)], "stitching", Draws.of(torch.arange(23), 3, 3, 0))
    assert problem.endswith("rows to fit on than columns (13), got 11; take more rows")
    for measure in ("stitching", "relative", "asif"):
        drawn = Draws.of(torch.zeros(23).long(), 3, 3, 0)
        results, [problem] = compare(wide, [(1, 0)], measure, drawn)
        assert results == {}
        assert problem.startswith(f"{measure} must have two rows in each half of the examples, got")


def test_the_map_is_least_squares(draw):
    x, y = draw(53, 3), draw(53, 5, seed=1)
    result = fit_stitch(x, y, ridge=0.0)
    design = torch.cat([x, torch.ones(53, 1).double()], 1)
    expected = torch.linalg.lstsq(design, y).solution
    assert torch.allclose(result(x), design @ expected)


def test_as_a_dictionary_it_gives_the_mapped_rows(draw):
    x, y = draw(53, 3) + 2, draw(53, 5, seed=1)
    stitch = fit_stitch(x, y)
    dictionary = stitch.dictionary("l.0:out", "l.3:out")
    assert torch.allclose(dictionary(x.float()).double(), stitch(x), atol=1e-6)
    assert dictionary.config.hook_points_or("") == (("l.0:out",), ("l.3:out",))


def test_rows_of_other_examples_are_refused(draw):
    with pytest.raises(ValueError, match="same examples, got 7 and 5 rows"):
        fit_stitch(draw(7, 2), draw(5, 2))
