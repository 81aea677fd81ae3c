import math

import pytest
import torch

from sae.evaluate.concepts import concept_vector, gradients, tcav, tcav_score

D = 13


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)

    def draw(n, concept=0.0):
        return torch.randn(n, D, generator=generator) + concept * torch.eye(D)[4]

    return draw


def test_the_vector_is_the_planted_direction(rows):
    vector = concept_vector(rows(503, 3.0), rows(503))
    assert float(vector[4]) > 0.95
    assert float(vector.norm()) == pytest.approx(1)


def test_a_logit_along_the_concept_scores_1_and_is_significant(rows):
    answer = lambda x: (2 * x[:, 4] + x[:, 7] * 0.1).exp()  # noqa: E731
    result = tcav(
        rows(101, 3.0), [rows(101) for _ in range(23)], gradients(answer, rows(53)), n_concepts=5
    )
    assert result.score == 1.0
    assert result.random == pytest.approx(0.5, abs=0.35)
    assert result.p < 0.01
    assert result.significant
    assert tcav_score(gradients(answer, rows(53)), -torch.eye(D)[4]) == 0.0


def test_a_logit_that_does_not_use_the_concept_is_not_significant(rows):
    answer = lambda x: (x[:, 7] * x[:, 8]) + x[:, 9].square()  # noqa: E731
    result = tcav(rows(101, 3.0), [rows(101) for _ in range(9)], gradients(answer, rows(211)))
    assert result.score == pytest.approx(0.5, abs=0.1)
    assert not result.significant


def test_gradients_are_those_of_each_row(rows):
    x = rows(7)
    assert torch.allclose(gradients(lambda r: r.square().sum(1), x), 2 * x)
    assert not x.requires_grad


def test_few_random_sets_and_empty_concepts_are_refused(rows):
    with pytest.raises(ValueError, match="random_sets must be at least 4, got 3"):
        tcav(rows(7), [rows(7)] * 3, rows(5))
    with pytest.raises(ValueError, match="both sides must have rows, got 0 and 7"):
        concept_vector(rows(0), rows(7))


def test_scores_that_never_vary_have_no_p_value(rows):
    gradient = torch.zeros(5, D)
    result = tcav(rows(23), [rows(23) for _ in range(4)], gradient)
    assert math.isnan(result.p)
    assert not result.significant
