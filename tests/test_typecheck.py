"""What runs in a test checks its annotations: without this, no test would see a wrong shape."""

from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from activations_cache import io
from sae import metrics
from tests.typecheck import checked


def same(x: Float[Tensor, "row column"]) -> Float[Tensor, "column row"]:
    return x


def test_a_dimension_has_one_size_in_a_call_and_may_have_another_in_the_next():
    for width in (3, 4):
        x = torch.randn(5, width)
        assert metrics.fvu(x, x) == 0
    with pytest.raises(TypeError, match="x_hat"):
        metrics.fvu(torch.randn(5, 3), torch.randn(5, 4))


def test_what_is_returned_is_checked_with_what_was_given():
    assert checked(same)(torch.ones(3, 3)).shape == (3, 3)
    with pytest.raises(TypeError, match="return"):
        checked(same)(torch.ones(3, 4))


def test_plain_annotations_are_checked():
    wrong: Any = 3
    with pytest.raises(TypeError, match="path"):
        io.problem(wrong, {})
