import pytest
import torch

from sae.evaluate.alignment import fit_stitch, stitching_loss


@pytest.fixture
def reader(draw):
    """A fixed readout of a stream, and its loss on what it reads from the true stream."""
    weight = draw(7, 3, seed=5)
    return lambda y: lambda rows: float((rows @ weight - y @ weight).square().mean())


def test_stitching_a_rotated_copy_restores_the_loss(draw, rotation, reader):
    y = draw(211, 7) + 4
    x = 3 * y @ rotation(7) + 1
    stitch = fit_stitch(x[:101], y[:101], ridge=0.0)
    result = stitching_loss(reader(y[101:]), stitch, x[101:], y[101:])
    assert result.loss == 0
    assert result.loss_stitched == pytest.approx(0, abs=1e-18)
    assert result.loss_mean > 1


def test_an_unrelated_stream_carries_nothing(draw, reader):
    y, x = draw(997, 7), draw(997, 5, seed=1)
    stitch = fit_stitch(x[:499], y[:499])
    result = stitching_loss(reader(y[499:]), stitch, x[499:], y[499:])
    assert result.loss_stitched == pytest.approx(result.loss_mean, rel=0.05)


def test_the_map_is_least_squares(draw):
    x, y = draw(53, 3), draw(53, 5, seed=1)
    result = fit_stitch(x, y, ridge=0.0)
    design = torch.cat([x, torch.ones(53, 1).double()], 1)
    expected = torch.linalg.lstsq(design, y).solution
    assert torch.allclose(result(x), design @ expected)


def test_rows_of_other_examples_are_refused(draw):
    with pytest.raises(ValueError, match="same examples, got 7 and 5 rows"):
        fit_stitch(draw(7, 2), draw(5, 2))
